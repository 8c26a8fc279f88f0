"""Places on the Hub by URL: ``hf://org/name@revision/folder``, as huggingface_hub has it, and addresses of pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from frodctl.errors import UsageError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|(www\.)?(huggingface\.co|hf\.co)(/|$)", re.IGNORECASE)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHERS = re.compile(r"/?(datasets|spaces|kernels|buckets)/")
_ROUTES = "(?:tree|blob|resolve|raw|blame)"  # of pages: what a revision follows
_REVISION = r"(?P<revision>refs/(?:pr/[0-9]+|convert/[\w.-]+)(?=/|$)|[^/]+)"
_URI = re.compile(rf"(?:models/)?(?P<repo>(?>[^/@]+(?:/[^/@]+)?))(?:@{_REVISION})?(?:/(?P<path>.*))?")
_PAGE = re.compile(
    rf"/(?:models/)?(?P<repo>[^/]+(?:/(?!{_ROUTES}/)[^/]+)?)(?:/{_ROUTES}/{_REVISION}(?:/(?P<path>.*))?|/?)"
)
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE = re.compile(r"\.(safetensors|bin|json)$")


@dataclass(frozen=True)
class HubUrl:
    """What a URL names."""

    repo: str
    revision: str | None
    folder: str  #: in the repository; "" for the repository itself
    file: str  #: in the folder; "" for the folder itself


def is_url(text: str) -> bool:
    """Whether it looks like a URL rather than a path or an id."""
    return _URL.match(text) is not None


def parse(text: str) -> HubUrl:
    """The place that a URL names.

    Raises
    ------
    UsageError
        It leads to another host than the Hub, or to no model.
    """
    try:
        url = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError:  # brackets of an address that is none
        raise UsageError("the address in this URL is none; as hf://org/name@revision/folder is one") from None
    shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"  # without what may be secret
    if url.scheme == "hf":
        shown, place, pattern = text, text.partition("://")[2], _URI
    elif url.scheme in ("http", "https"):
        place, pattern = _page(url, shown), _PAGE
    else:
        raise UsageError(f"{shown}: URLs of this kind are not taken, only hf:// and the Hub's own https://")
    if other := _OTHERS.match(place):
        raise UsageError(f"{shown}: is no model, but one of the Hub's {other[1]}")
    match = pattern.fullmatch(place)
    path = [unquote(part) for part in (match["path"] or "").strip("/").split("/")] if match else []
    revision = unquote(match["revision"]) if match and match["revision"] else None
    if match is None or not _REPO.fullmatch(match["repo"]) or not all(map(_is_plain, [*path, revision or ""])):
        raise UsageError(f"{shown}: names no model, nor a folder in one; as hf://org/name@revision/folder does")
    file = path.pop() if _FILE.search(path[-1]) else ""
    return HubUrl(match["repo"], revision, "/".join(path), file)


def _page(url: SplitResult, shown: str) -> str:
    """The path of a page of the Hub, or of the one that HF_ENDPOINT names."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if url.netloc.lower() == endpoint.netloc.lower():
        return url.path.removeprefix(endpoint.path)
    if url.netloc.lower() not in _HOSTS:
        raise UsageError(f"{shown}: that host is not the Hub ({constants.ENDPOINT}) and is not asked")
    return url.path


def _is_plain(part: str) -> bool:
    """Whether it is what folders and revisions are called."""
    return part.isprintable() and "\\" not in part and not {".", ".."} & set(part.split("/"))
