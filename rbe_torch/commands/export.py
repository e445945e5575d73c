"""`rbe export`: a compressed model as a plain transformers directory, or as a program of torch.export."""

from __future__ import annotations

import argparse
from pathlib import Path

from .tables import megabytes
from .target import check_directory, check_file


def run(options: argparse.Namespace) -> None:
    from ..checkpoint import load_pretrained
    from ..models import copy_companions, directory_bytes, is_compressed, transformers_module
    from ..replace import decompress

    source = Path(options.path)
    if not source.is_dir() or not is_compressed(source):
        raise ValueError(f"{source}: is no directory that `rbe compress` wrote")
    transformers_module()  # without its progress bars
    if options.to == "pt2":
        from ..export import export_program, write_program

        file = Path(options.out) if options.out is not None else source.with_name(source.name + ".pt2")
        check_file(file, options.force)
        write_program(export_program(load_pretrained(source)), file)
        print(f"{file}: {megabytes(file.stat().st_size)}; import rbe_torch, then torch.export.load({str(file)!r}).module()")
        return
    target = Path(options.out) if options.out is not None else source.with_name(source.name + "-dense")
    check_directory(target, options.force, source, "--out")
    model = decompress(load_pretrained(source))
    if hasattr(model, "config"):
        model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    copy_companions(source, target)
    print(f"{target}: {megabytes(directory_bytes(target))}, dense")
