"""Prints what a build against the installed torch needs, as a CMake list: include folders (joined by |), library folder,
C++ ABI, CUDA version or 0."""

import torch
from torch.utils.cpp_extension import include_paths, library_paths

cxx11_abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
print(";".join(["|".join(include_paths()), library_paths()[0], str(cxx11_abi), torch.version.cuda or "0"]), end="")
