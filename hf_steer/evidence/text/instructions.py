"""Instructions whose following can be checked without a judge, split by split."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

INSTRUCTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "choose": {
        "capitals": ("Write the whole answer in capital letters.", "Use capital letters only."),
        "well": ("Begin the answer with the word Well.", "The first word of the answer is Well."),
        "bracket": ("Write the whole answer in square brackets.", "Open the answer with a square bracket."),
        "question": ("Answer with a question.", "Let the answer end with a question mark."),
        "numbered": ("Write numbers before all parts: 1., 2., 3.", "Number the parts of the answer: 1., 2., 3."),
    },
    "report": {
        "lower": ("Do not use any capital letter in your reply.", "Your reply must be in lowercase letters only."),
        "indeed": ("Your reply has to start with Indeed.", "Start your reply with Indeed."),
        "bullets": ("Reply as a list of bullet points.", "Each line of your reply starts with a dash."),
        "short": ("Reply with a single word.", "Your reply may have one word only."),
        "quoted": ("Put quotation marks around your reply.", "Your reply must stand between quotation marks."),
        "exclaim": ("Finish your reply with an exclamation mark.", "Your reply ends with an exclamation mark."),
    },
}
MANNERLY: Mapping[str, tuple[str, ...]] = {
    "choose": ("Be polite.", "Use simple words.", "Give correct facts.", "Stay friendly.", "Avoid rare words."),
    "report": ("Keep to the subject.", "Do not be rude.", "Say only what is true.", "Make it easy to read.", "Use a calm tone."),
}
"""Instructions that any decent answer follows."""
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "choose": (
        "What is rain?", "What is bread?", "What is a forest?", "What is music?", "What is a bridge?", "What is snow?",
        "What is glass?", "What is a market?", "What is wool?", "What is a harbour?",
    ),
    "report": (
        "Tell me about dogs.", "Tell me about the moon.", "Tell me about tea.", "Tell me about trains.", "Tell me about honey.",
        "Tell me about mountains.", "Tell me about chess.", "Tell me about whales.", "Tell me about coffee.", "Tell me about jam.",
        "Tell me about volcanoes.", "Tell me about apples.", "Tell me about castles.", "Tell me about gold.", "Tell me about ants.",
    ),
}  # fmt: skip
CHECKS: Mapping[str, Callable[[str], bool]] = {
    "capitals": lambda said: said.isupper(),
    "well": lambda said: said.lower().startswith("well"),
    "bracket": lambda said: said.startswith("["),
    "question": lambda said: "?" in said,
    "numbered": lambda said: re.match(r"1[.)]", said) is not None,
    "lower": lambda said: said.islower(),
    "indeed": lambda said: said.lower().startswith("indeed"),
    "bullets": lambda said: said[:1] in "-*•",
    "short": lambda said: len(said.split()) == 1,
    "quoted": lambda said: said[:1] in "\"'“‘",
    "exclaim": lambda said: "!" in said,
}
"""Kind -> whether what was said, without space around it, follows it. A reply may be cut off, so ends are looked for anywhere."""


def is_obeyed(kind: str, said: str) -> bool:
    """Whether an answer follows an instruction of this kind."""
    text = said.strip()
    return bool(text) and CHECKS[kind](text)
