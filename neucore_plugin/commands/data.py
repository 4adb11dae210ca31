"""neucore data emoji | drawings | check: make the embedded data set, or see whether another one is in place."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from neucore_plugin.commands import positive, print_json
from neucore_plugin.config.published import PUBLISHED

HELP = "prepare the emoji data set, or check another one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`emoji`, `drawings SOURCE`, and `check NAME`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    emoji = actions.add_parser("emoji", help="render the OpenMoji drawings into the cache")
    emoji.add_argument("--cache-dir", type=Path, help="where to (default $NEUCORE_CACHE or ~/.cache/neucore)")
    emoji.add_argument("--image-size", type=int, default=224, help="side in pixels (default 224)")
    other = actions.add_parser(
        "drawings",
        help="make a folder of other emoji drawings, for datasets.emoji.build_info.drawings",
        description="Make a folder of other emoji drawings, named by code point, for "
        "datasets.emoji.build_info.drawings. Example: "
        "neucore data drawings /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf --out noto",
    )
    other.add_argument(
        "source",
        type=Path,
        help="a font of colour bitmaps (Debian: fonts-noto-color-emoji), or a folder of pictures named by code point "
        "(npm pack @lobehub/fluent-emoji-3d, unpacked)",
    )
    other.add_argument("--out", type=Path, required=True, help="the folder to write")
    other.add_argument("--image-size", type=int, default=224, help="side in pixels (default 224)")
    other.add_argument(
        "--mend-tones",
        action="store_true",
        help="of a folder: tell medium-light and medium skin by how light they are; Fluent's package mixes them up",
    )
    check = actions.add_parser("check", help="is a data set in place: counts, missing images, what to fetch and where")
    check.add_argument("name", choices=(*PUBLISHED, "folder"), help="the data set")
    check.add_argument("--root", type=Path, help="its root folder (default: its variable, such as NEUCORE_CIRR_ROOT)")
    check.add_argument("--open", action="store_true", help="also decode every picture, and name those that fail")
    check.add_argument("--max-pixels", type=positive, help="with --open: pictures of more pixels fail, as in a run")
    check.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where `check` finds that something is missing or wrong."""
    if arguments.action in ("emoji", "drawings"):
        from neucore_plugin.config.loading import dataset_defaults
        from neucore_plugin.datasets.emoji import drawings, splits, styles

        given = {"build_info": {"image_size": arguments.image_size}}
        size = dataset_defaults("emoji", given)["build_info"]["image_size"]
        if arguments.action == "emoji":
            print(drawings.prepare(arguments.cache_dir, size))
            return 0
        texts = splits.emoji_texts(drawings.svg_files())
        count = styles.convert(arguments.source, arguments.out, texts, size, arguments.mend_tones)
        print(f"{arguments.out}: {count:,} of {len(texts):,} emoji")
        return 0
    from neucore_plugin.common.images import MAX_PIXELS
    from neucore_plugin.datasets.check import check

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the readers tell on the log of a run
    report = check(arguments.name, arguments.root, arguments.open, arguments.max_pixels or MAX_PIXELS)
    if arguments.json:
        print_json(report)
    else:
        print("\n".join(_lines(report)))
    return 0 if report["complete"] else 1


def _lines(report: dict[str, Any]) -> list[str]:
    wide = max(len("split"), *(len(split) for split in report["splits"]))
    lines = [
        f"{report['title']} below {report['root']}",
        f"{'split':<{wide}}  {'queries':>8}  {'gallery':>8}  images missing",
    ]
    problems = [] if os.path.isdir(report["root"]) else [f"no such folder: {report['root']}"]
    notices = []
    for split, row in report["splits"].items():
        queries, gallery, state = (
            f"{row[key]:,}" if key in row else "–" for key in ("queries", "gallery", "images_missing")
        )
        if row["annotations_missing"]:
            state = "incomplete" if "queries" in row else "no annotations"
        state = "damaged" if row["error"] else state
        lines.append(f"{split:<{wide}}  {queries:>8}  {gallery:>8}  {state:>14}")
        problems += [row["error"]] if row["error"] else []
        problems += [f"missing: {file}" for file in row["annotations_missing"]]
        if row.get("images_missing"):
            examples = ", ".join(row["missing_examples"])
            place = row["image_folder"]
            problems.append(
                f"missing: {row['images_missing']:,} images of {split}, such as {examples}; they belong below {place}"
            )
        if row.get("images_unreadable"):
            problems.append(f"{row['images_unreadable']:,} images of {split} cannot be read, such as")
            problems += [f"  {reason}" for reason in row["unreadable"]]
        if 0 < row.get("skipped_queries", 0) < row["queries"]:
            problems.append(f"`missing: skip` leaves {row['skipped_queries']:,} queries of {split} out")
        notices += [f"{split}: {notice}" for notice in row["notices"]]
    lines += notices
    if report["complete"]:
        return [*lines, "complete"]
    return [*lines, "", *dict.fromkeys(problems), "", "where it comes from:", report["sources"]]
