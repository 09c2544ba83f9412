"""Tasks for lm-evaluation-harness: a YAML each, and what makes their documents."""
