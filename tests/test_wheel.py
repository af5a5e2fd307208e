"""What ``pip install`` gives: the library and its migrations, without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sqlalchemy import URL

ROOT = Path(__file__).parent.parent

SCRIPT = """
import asyncio, pathlib, sys
import kotonoha_store
from kotonoha_store import HashingEmbedder, Store, migrations

async def main():
    async with Store.open(embedder=HashingEmbedder()) as store:
        await store.migrate()
        await migrations.check(store.database)
        print(kotonoha_store.__file__)
        print(migrations.script_location())
        print(await migrations.current(store.database), migrations.head())

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"kotonoha_store", "kotonoha_store-0.1.0.dist-info"}
    for needed in ("py.typed", "alembic/env.py", "alembic/script.py.mako", "alembic/versions/kotonoha/0001_seed.py"):
        assert f"kotonoha_store/{needed}" in names
    assert not [name for name in names if "__pycache__" in name]


def test_it_migrates_outside_the_checkout(wheel: Path, empty_url: URL, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(installed),
            "DATABASE_URL": empty_url.render_as_string(hide_password=False),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, scripts, revisions = done.stdout.split("\n")[:3]
    assert Path(package).is_relative_to(installed)
    assert Path(scripts) == installed / "kotonoha_store" / "alembic"
    current, head = revisions.split()
    assert current == head
