"""Model folders with code that a loader could run: it would leave a file behind."""

from __future__ import annotations

import json
from pathlib import Path

CLASSES = {
    "AutoConfig": "evil.Config",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoProcessor": "evil.Processor",
}
"""What transformers loads from a file of the folder if it trusts the folder."""


def plant_code(folder: Path, *, new_type: bool = False) -> Path:
    """Map all classes of a model folder to code; returns the file that the code would write.

    With `new_type`, the configuration is of a type that only the code defines.
    """
    ran = folder / "ran"
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text()) if path.exists() else {}
        config["auto_map"] = CLASSES
        if name == "config.json":
            config["model_file"] = "evil.py"  # the name that mlx-lm reads
            if new_type:
                config["model_type"] = "evil"
        elif new_type:
            config["tokenizer_class"] = "EvilTokenizer"
        path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PreTrainedConfig):\n    model_type = 'evil'\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "class Model:\n    pass\n"
        "Processor = ModelArgs = Model\n"
    )
    return ran
