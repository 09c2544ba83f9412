"""One save after the other, each stopped at the next thing that it does to its folder; what the folder then holds, as JSON.

Called with a folder, and with pairs of `kill` (the process dies there) or `full` (from there on the disk takes nothing) and of the
way of saving.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from kit.aligning import align, logits, stir
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import SteerConfig, patch_model

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
SAVES = {
    "save_steering": hf_steer.save_steering,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="30KB"),
}


def make(seed):
    model = patch_model(make_encoder_model("whisper"), align("whisper", "output", "simple"), freeze_base=False)
    stir(model, seed)
    with torch.no_grad():  # the base has learned, too
        model.model.decoder.layer_norm.weight.add_(0.5 * seed)
    return model


def stop_at(number, folder, how):
    """From now on, the `number`th touch of the folder is the last."""
    touched = 0

    def hook(event, args):
        nonlocal touched
        if event not in TOUCHES or not args or folder not in str(args[0]) or (event == "open" and args[1] in ("r", "rb")):
            return
        touched += 1
        if touched == number and how == "kill":
            os._exit(9)
        if touched >= number and how == "full":
            raise OSError(28, "No space left on device")

    sys.addaudithook(hook)


def outputs(way, folder):
    inputs = make_encoder_inputs("whisper")
    if way == "save_steering":
        model = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(folder))
        hf_steer.load_steering(model, folder)
    else:
        model = hf_steer.from_pretrained(folder)
    return logits(model.eval(), inputs)


def stop_everywhere(models, how, way, root):
    """What the folder holds after a save that was stopped at its first touch, its second, ...: `old`, `new` or `neither`."""
    SAVES[way](models[0], f"{root}/old")
    SAVES[way](models[1], f"{root}/new")
    expected = {name: outputs(way, f"{root}/{name}") for name in ("old", "new")}
    assert not torch.equal(expected["old"], expected["new"])
    found = []
    for number in range(1, 500):
        folder = f"{root}/{number}"
        shutil.copytree(f"{root}/old", folder)
        child = os.fork()
        if not child:
            stop_at(number, folder, how)
            try:
                SAVES[way](models[1], folder)
            except Exception:
                os._exit(3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        result = outputs(way, folder)
        found.append(next((name for name, value in expected.items() if torch.equal(value, result)), "neither"))
        hf_steer.save_steering(models[1], folder)  # and what was left behind is cleared
        assert not [path for path in Path(folder).iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder)
        if code == 0:
            break
    return found


if __name__ == "__main__":
    both = make(1), make(2)
    results = {}
    for case in sys.argv[2:]:
        results[case] = stop_everywhere(both, *case.split("-"), f"{sys.argv[1]}/{case}")
    print("RESULT", json.dumps(results))
