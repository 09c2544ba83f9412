"""Run in another process: it imports hf_steer, loads a patched model from a file, and says what the model says there.

`python visitor.py <pickle|torch> <folder>` reads `model.*` and `call.pt`, and writes `said.pt`.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

import hf_steer


def visit(model, call):
    """Steered logits and tokens, the unsteered ones, and the logits after unpatching."""
    inputs, said = call
    with torch.no_grad():
        with hf_steer.use_saliency(model, hf_steer.Saliency.from_tokens(said)):
            steered = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with hf_steer.disable_steering(model):
            plain = model(**inputs).logits
        status = str(hf_steer.get_steer_status(model).heads)
        hf_steer.unpatch_model(model)
        unpatched = model(**inputs).logits
    return {"steered": steered, "tokens": tokens, "plain": plain, "unpatched": unpatched, "status": status}


def spawned(connection, model, call):
    """The target of a spawned process, which gets its model through a pipe."""
    try:
        connection.send({name: value.tolist() if hasattr(value, "tolist") else value for name, value in visit(model, call).items()})
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def main(kind: str, folder: Path) -> None:
    if kind == "pickle":
        model = pickle.loads((folder / "model.pickle").read_bytes())
    else:
        model = torch.load(folder / "model.torch", weights_only=False)
    torch.save(visit(model, torch.load(folder / "call.pt", weights_only=False)), folder / "said.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
