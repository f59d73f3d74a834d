"""Real text for demos, examples and tests, without a hub."""

from .byte_tokens import byte_tokenizer
from .domains import Domain, Windows, get_domain, list_domains, load_domain, pack
from .packages import PackageFile, package_file


__all__ = [
    "Domain",
    "PackageFile",
    "Windows",
    "byte_tokenizer",
    "get_domain",
    "list_domains",
    "load_domain",
    "pack",
    "package_file",
]
