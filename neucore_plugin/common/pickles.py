"""Pickles that somebody else wrote: what is looked at before a restricted unpickler takes one up."""

import pickle
import pickletools

_MOST_TUPLES = 16  # a tuple that holds another twice, and so on, takes for ever to be compared; an array has six


def refuse_bombs(content: bytes) -> None:
    """UnpicklingError for a pickle that would fill the memory or the day; ValueError for one that is damaged."""
    tuples = 0
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and int(argument) > len(content):
            raise pickle.UnpicklingError("refused: it numbers its parts beyond its own size")
        tuples += operation.name.startswith("TUPLE")
        if tuples > _MOST_TUPLES:
            raise pickle.UnpicklingError("refused: it nests tuples, which nothing that is read here needs")
