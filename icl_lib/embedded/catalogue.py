"""The catalogue of embedded models: what each is made of and what is claimed of it."""

import dataclasses
from pathlib import Path

from icl_lib.files import names
from icl_lib.files.paths import root


@dataclasses.dataclass(frozen=True)
class Entry:
    """One embedded model: its name, and its folder of model files and SAEs below the repository root."""

    name: str
    folder: str

    @property
    def model(self) -> Path:
        """The folder of the model's files."""
        return root() / self.folder

    @property
    def saes(self) -> Path:
        """The folder of its SAE suite."""
        return self.model / "saes"


CATALOGUE = {entry.name: entry for entry in (Entry("icl-tiny", "assets/icl-tiny"),)}

for _entry in CATALOGUE.values():
    names.register(_entry.name, "model", lambda entry=_entry: entry.model)
    names.register(_entry.name, "saes", lambda entry=_entry: entry.saes)
