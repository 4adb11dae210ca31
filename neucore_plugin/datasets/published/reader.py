"""What a published data set is: its splits, its files, where they come from, and how they are read. No host."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from neucore_plugin.common.errors import ConfigError, DataError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.common.names import Listing
from neucore_plugin.config.published import SPLITS, UNANSWERED_SPLITS
from neucore_plugin.datasets.annotations import refuse
from neucore_plugin.datasets.triplets import Gallery, Triplet, no_names


@dataclass(frozen=True)
class Reader:
    """A published data set: what belongs where, and its annotation files as triplets and galleries.

    files: of a split, the annotation files that it needs, below the root.
    images: of a split, the folder of its images, below the root; where copies are laid out in several ways, the
        folders that it may be, the published one first.
    annotation_folders: where below the root `files` are looked for, the published place first.
    parse: (root, split, problems) -> triplets, and the files of the gallery by name; what is wrong with an entry goes
        to `problems`, a line each.
    where_from: what to fetch from where, and where it belongs; "{root}" stands for the root folder.
    queries: of a split, those of its `files` that hold its queries alone, which can be counted without the others.
    names: ids of images -> what a page calls those that have a name to be read, by id.
    """

    name: str
    title: str
    credit: str
    files: Callable[[str], tuple[str, ...]]
    images: Callable[[str], tuple[str, ...]]
    parse: Callable[[Path, str, list[str]], tuple[list[Triplet], dict[str, Path]]]
    where_from: str
    queries: Callable[[str], tuple[str, ...]]
    annotation_folders: tuple[str, ...] = ("",)
    names: Callable[[Iterable[str]], dict[str, str]] = no_names

    @property
    def answered(self) -> tuple[str, ...]:
        """The splits with targets."""
        return SPLITS[self.name]

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits, those for a test server included."""
        return (*self.answered, *UNANSWERED_SPLITS.get(self.name, ()))

    @property
    def root_variable(self) -> str:
        """The environment variable that may name the root folder."""
        return f"NEUCORE_{self.name.upper()}_ROOT"

    def check_split(self, split: str) -> None:
        """ConfigError where there is no such split."""
        if split not in self.splits:
            raise ConfigError(f"{self.title} has no split {split!r}.{nearest(split, self.splits)}")

    def read(self, root: str | Path, split: str) -> tuple[list[Triplet], Gallery]:
        """Triplets and gallery of a split. Image files need not exist. Raises DataError listing every problem."""
        self.check_split(split)
        root = expanded(root)
        problems: list[str] = []
        triplets, paths = self.parse(root, split, problems)
        listing, files = Listing(), {}
        for name, path in paths.items():
            try:
                files[name] = listing.find(path) or path
            except DataError as error:
                problems.append(str(error))
        refuse(root, problems, f" of split {split!r}")
        return triplets, Gallery.of(files)

    def annotation(self, root: str | Path, file: str) -> Path:
        """The path of one of `files`: where it is found, else where it belongs."""
        places = [Path(root, folder, file) for folder in self.annotation_folders]
        beside = (place for place in places if place.parent.is_dir())  # where other files of its kind lie
        return next((place for place in places if place.is_file()), next(beside, places[0]))

    def image_folder(self, root: str | Path, split: str) -> str:
        """Where the images of a split are, else where they belong."""
        places = [Path(root, folder) for folder in self.images(split)]
        return str(next((place for place in places if place.is_dir()), places[0]))

    def sources(self, root: str | Path) -> str:
        """What to fetch, from where, and where it belongs."""
        return self.where_from.format(root=Path(root))
