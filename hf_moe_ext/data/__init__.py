"""Real text for demos, examples and tests, without a hub."""

from .domains import Domain, Windows, get_domain, list_domains, load_domain, pack
from .packages import PackageFile, package_file


__all__ = ["Domain", "PackageFile", "Windows", "get_domain", "list_domains", "load_domain", "pack", "package_file"]
