"""Words as Whisper's authors compare them, and how many of them are wrong."""

from functools import lru_cache


@lru_cache
def normalizer():
    """Whisper's own for English: small letters, no punctuation, numbers as digits. Without its list of British spellings."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normal_words(text):
    return normalizer()(text).split()


def edits_between(due, found):
    """Fewest words put in, left out or taken for others that make one list of words the other."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(due, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(found, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


def error_rate_of(pairs):
    """Word error rate over pairs of due and found words: edits by due words, of all together."""
    return sum(edits_between(due, found) for due, found in pairs) / sum(len(due) for due, _ in pairs)
