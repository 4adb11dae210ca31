"""neucore export: a trained model as a folder that a hub takes, and as ONNX."""

import argparse
import sys
from pathlib import Path

from neucore_plugin.commands import import_own
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.text import visible

HELP = "write a trained model as a folder of safetensors and JSON, for a hub, and as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, --out, and what else goes into the folder."""
    parser.epilog = "example: neucore export output/emoji/RUN/checkpoint_best.pth --out my-model --onnx"
    parser.add_argument("checkpoint", help="what training wrote: .../checkpoint_best.pth; or an exported folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; a new one")
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="also image.onnx and query.onnx, and search.py, which searches without torch",
    )
    parser.add_argument("--license", metavar="ID", help="of your weights, as hubs name it, such as mit or cc-by-4.0")
    parser.add_argument("--module", help="module of your own to import first: it registers the checkpoint's backbone")


def run(arguments: argparse.Namespace) -> None:
    """Load, write beside, rename. Raises NeucoreError; then nothing is left."""
    from neucore_plugin import __version__, load_model
    from neucore_plugin.common.files import atomic_write, expanded, new_folder
    from neucore_plugin.export.card import card, found_results, places, trained_on
    from neucore_plugin.host.importing import before_import
    from neucore_plugin.report import check_results
    from neucore_plugin.weights import checkpoint, folder

    license = arguments.license
    if license is not None and not (license.isascii() and license.replace("-", "").replace(".", "").isalnum()):
        raise ConfigError(f"--license {license!r}: is no identifier such as mit, apache-2.0 or cc-by-nc-4.0")
    before_import()
    if arguments.onnx:
        from neucore_plugin.export.graphs import check_packages

        check_packages()
    with new_folder(arguments.out) as out:
        import_own(arguments.module)
        model = load_model(arguments.checkpoint)
        stored, source = checkpoint.load(arguments.checkpoint), expanded(arguments.checkpoint)
        header = {**model.checkpoint_header(), "config": stored["architecture"]["config"]}
        folder.write(out, {**stored, "architecture": header}, __version__)
        onnx = None
        if arguments.onnx:
            from neucore_plugin.export.graphs import export_onnx

            onnx = export_onnx(model, out)
        fingerprint = model.fingerprint()
        results, without = found_results(source, fingerprint)
        check_results(results, source.parent)
        text = card(
            name=arguments.out.absolute().name,
            header=header,
            fingerprint=fingerprint,
            version=__version__,
            license=license,
            datasets=trained_on(source),
            results=results,
            without=without,
            onnx=onnx,
        )
        with atomic_write(out / "README.md", "w") as stream:
            stream.write(text)
        if load_model(out).fingerprint() != fingerprint:
            raise ConfigError(f"{arguments.checkpoint}: what was written is not the same model; please report this")
    for place in places(header["config"]):
        print(
            visible(f"note: it names a file of this machine, which is needed wherever it is loaded: {place}"),
            file=sys.stderr,
        )
    if without:
        print(visible(f"note: the card has no results: {without}"), file=sys.stderr)
    if license is None:
        print("note: the card names no licence; set it with --license, or in README.md", file=sys.stderr)
    print(visible(f"exported: {arguments.out}"))
