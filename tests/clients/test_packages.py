"""The Debian packages that the clients' READMEs and the Makefile name."""

import re
import shlex

from tests.clients.conftest import LANGUAGES
from tests.clients.programs import shell_blocks
from tests.e2e.system import ROOT


def test_makefile_names_the_packages_of_all_readmes() -> None:
    needed: set[str] = set()
    for language in LANGUAGES:
        apt_get, install, *packages = shlex.split(shell_blocks(language)[0].replace("\\\n", ""))
        assert (apt_get, install) == ("apt-get", "install")
        needed |= set(packages)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(r"^CLIENT_PACKAGES := (.*)$", makefile, re.MULTILINE)
    assert found
    assert set(found[1].split()) == needed
