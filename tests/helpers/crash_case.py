"""One writer of an index, to be killed at any moment: prints `did WHAT NAMES...` after each call has returned.

python crash_case.py INDEX PICTURES SEED
"""

import json
import random
import sys
from pathlib import Path

from colour_model import ColourModel, draw

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import GalleryIndex


def say(what, names):
    print(json.dumps([what, names]), flush=True)


def main(index, pictures, seed):
    chance = random.Random(seed)
    options = {"progress": False, "workers": 1}
    try:
        opened = GalleryIndex.build(ColourModel(), pictures / "first", out=index, unit_size=3, **options)
    except DataError:  # built by an earlier life, and synced since
        opened = GalleryIndex.open(index, ColourModel())
    say("built", opened.names)
    number = 0
    while True:
        step = chance.choice(["add", "add", "remove", "sync", "compact"])
        if step == "add":
            number += 1
            new = pictures / "more" / f"{seed}-{number}.png"
            draw(new, tuple(chance.randrange(256) for _ in range(3)))
            say("added", opened.add([new], **options))
        elif step == "remove" and len(opened) > 8:
            gone = chance.sample([name for name in opened.names if "more" in name] or opened.names[:1], 1)
            say("removing", gone)
            opened.remove(gone)
            say("removed", gone)
        elif step == "sync":
            place = pictures / "first" / f"s{chance.randrange(6)}.png"
            existed = place.exists()
            if existed:
                say("removing", [place.name])
                place.unlink()
            else:
                draw(place, tuple(chance.randrange(256) for _ in range(3)))
            opened.sync(pictures / "first", **options)
            say("removed" if existed else "added", [place.name])
        elif step == "compact":
            opened.compact()
            say("compacted", [])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
