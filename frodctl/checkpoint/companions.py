"""The rest of a checkpoint's folder: what a model needs beside its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from frodctl.checkpoint.bounds import MAX_JSON_BYTES
from frodctl.checkpoint.inputs import decode_json, open_input
from frodctl.checkpoint.records import Checkpoint
from frodctl.errors import InvalidInput

#: Weights in whatever format, what trainers leave behind, and adapters.
_NOT_COPIED = re.compile(
    r"""(?ix)
    .*\.(safetensors|bin|pt|pt2|pth|ckpt|h5|keras|msgpack|pb|pkl|npy|npz|onnx|gguf|ggml|llamafile|tflite|ot|nemo|engine)
    | .*\.(torchscript|ftz|mlmodel|mlpackage|parquet|arrow|gz|zip|tar|index(\..*)?\.json)
    | .*\.onnx[._]data.* | variables\.data-.*
    | adapter_(config\.json|model\..*)
    | (optimizer|scheduler|trainer_state|training_args|rng_state|all_results|train_results|eval_results)\b.*
    | .*\.(lock|incomplete|tmp|partial) | README\.md | frodctl\.json | events\.out\..*
    """
)
#: Folders that are never a part of the model.
_OTHER_FOLDERS = re.compile(r"(?i)checkpoint-\d+|runs|logs|wandb|__pycache__|.*\.partial")
#: Copied as they are even with weights inside: sentence-transformers lists its modules here.
MODULES_FILE = "modules.json"


def companions(files: Iterable[str], module_folders: Collection[str] = ()) -> list[str]:
    """Choose among the relative paths of a folder's files those that a model needs beside its weights.

    Configs, tokenizer, processor, templates, code and licence, and sub-folders without weights; of the folders
    that `module_folders` found everything. No hidden file, no cache, no adapter, and not the model card.
    """
    paths = [PurePosixPath(file) for file in files]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    with_weights = {path.parts[0] for path in paths if len(path.parts) > 1 and _NOT_COPIED.fullmatch(path.name)}
    skipped = {folder for folder in with_weights if folder not in module_folders}

    def wanted(path: PurePosixPath) -> bool:
        if len(path.parts) == 1:
            return not _NOT_COPIED.fullmatch(path.name)
        folder = path.parts[0]
        return folder in module_folders or (folder not in skipped and not _OTHER_FOLDERS.fullmatch(folder))

    return sorted(str(path) for path in paths if wanted(path))


def module_folders(modules_json: Path) -> set[str]:
    """The sub-folders that sentence-transformers' ``modules.json`` names; none where there is no such file."""
    try:
        with open_input(modules_json) as file:
            entries = decode_json(file.read(MAX_JSON_BYTES + 1))
        paths = [PurePosixPath(str(entry["path"])) for entry in entries]
    except (InvalidInput, OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()
    return {path.parts[0] for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts}


def is_of_sentence_transformers(file: str, module_folders: Collection[str]) -> bool:
    """Whether a companion says how to make a sentence encoder of the model, and nothing else."""
    path = PurePosixPath(file)
    if len(path.parts) > 1:
        return path.parts[0] in module_folders
    return (
        file == MODULES_FILE
        or re.fullmatch(r"(config_sentence_transformers|sentence_\w+_config)\.json", file) is not None
    )


def files_below(folder: Path, *, sub_folders: bool = True) -> list[str]:
    """Relative paths of the ordinary files in a folder and its sub-folders, hidden ones left out.

    A link counts if it leads to a file in the folder, or to the blobs of the Hub's cache that the folder is in.
    """
    root = folder.resolve()
    return _files_below(folder, (root, *_blobs(root)), sub_folders)


def _blobs(root: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of ``models--…/snapshots/COMMIT``, of which the folder is one or below."""
    for commit in (root, *root.parents):
        repository = commit.parent.parent
        blobs = repository / "blobs"
        if commit.parent.name == "snapshots" and repository.name.startswith("models--") and blobs.is_dir():
            return [] if blobs.is_symlink() else [blobs]
    return []


def _files_below(folder: Path, within: tuple[Path, ...], sub_folders: bool) -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            inside = _files_below(path, within, True) if sub_folders else ()
            found += [f"{path.name}/{inner}" for inner in inside]
        elif path.is_file() and (not path.is_symlink() or any(path.resolve().is_relative_to(home) for home in within)):
            found.append(path.name)
    return found


def copied_files(checkpoint: Checkpoint, *, as_sentences: bool) -> tuple[str, ...]:
    """What goes with the weights as it is; nothing is known of it where only headers were fetched.

    What makes a sentence-transformers model of the base is left out where that is not wanted.
    """
    if checkpoint.root is None or not checkpoint.config:
        return ()
    path = checkpoint.path
    # a single file's folder may be anybody's: no sub-folders
    found = files_below(checkpoint.root, sub_folders=path is None or not path.is_file())
    folders = module_folders(checkpoint.root / MODULES_FILE)
    chosen = [name for name in companions(found, folders) if name != "config.json"]
    if not as_sentences:
        chosen = [name for name in chosen if not is_of_sentence_transformers(name, folders)]
    return tuple(chosen)
