"""A patched model in lm-evaluation-harness, under the name `hf-steer`; `python -m hf_steer.harness` is its `lm_eval`."""
