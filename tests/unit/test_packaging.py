"""What an installed wheel holds: the packages that serve and the embedded checkpoint, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_WEIGHTS = 50_000_000


def test_the_wheel_serves_the_embedded_checkpoint_and_leaves_training_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in tokenizer | {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"}:
        assert f"deploy/nano/{name}" in sizes, f"{name} is missing"
    assert sizes["deploy/nano/model.safetensors"] <= MAX_WEIGHTS
    folders = {name.split("/")[0] for name in sizes if ".dist-info" not in name}
    assert folders == {"cluster", "deploy", "experts", "router"}
