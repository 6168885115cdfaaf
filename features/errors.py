"""The root of every error that a user or an operator can cause, and the branches that training and serving share."""

from __future__ import annotations


class PenchantError(Exception):
    """A mistake that a user or an operator can correct; the message says what to do.

    The command line prints the message and ends with status 2. Anything else that reaches it is a defect of
    Penchant and shows its traceback.

    ```
    PenchantError
    ├── SettingsError        a setting is unknown, or its value cannot work
    ├── TablesError          a table of a data set cannot be read or written
    ├── VocabularyError      ids clash, or the file of ids is damaged
    ├── ProfileCorrupt       the stored profile of a user fails its checks
    ├── ProfileNewer         a later version of Penchant wrote the stored profile
    ├── BundleError          a bundle is damaged, foreign or incomplete
    ├── ForeignFileError     a file or folder to keep users' data in belongs to another user
    ├── TrainingError        a training, an evaluation or an export cannot go on
    │   ├── LeakError        test data would have been seen in training
    │   └── ExportError      a run does not pass the gates of export
    └── ServingError         see `serving/errors.py`: each class carries its gRPC status
    ```
    """


class SettingsError(PenchantError):
    """A setting is unknown, or its value cannot work; the message says what to change."""


class TablesError(PenchantError):
    """A table of a data set cannot be read or written; the message names the file."""


class VocabularyError(PenchantError):
    """Ids clash, or the file of ids is damaged."""


class ProfileCorrupt(PenchantError):
    """The stored profile of a user fails its checks."""


class ProfileNewer(PenchantError):
    """A later version of Penchant wrote the stored profile: it is whole, and this version leaves it alone."""


class BundleError(PenchantError):
    """A bundle is damaged, foreign or incomplete; the message names the file and the reason."""


class ForeignFileError(PenchantError):
    """A file or folder that is to keep users' data belongs to another user of the machine; the message names it."""


class TrainingError(PenchantError):
    """A training, an evaluation or an export cannot go on."""


class LeakError(TrainingError):
    """Test data would have been seen in training."""


class ExportError(TrainingError):
    """A run does not pass the gates of export; the message names the gate, its value and its limit."""
