"""A cache of the Hub as a download leaves it, without a network."""


def make_hub_cache(cache_dir, repo_id, files):
    """A repository as the Hub client keeps it on disk, so that the real loading code runs without a network."""
    root = cache_dir / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot
