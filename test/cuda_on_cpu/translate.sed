# What only nvcc reads, as C++ for cuda_runtime.h of this folder.
s/([A-Za-z_][A-Za-z_0-9]*(<[^<>;()]*>)?)<<</emu_launch([=](auto... a) { \1(a...); }, "\1", /g
s/>>>\(/)(/g
s/extern __shared__ (.*[^A-Za-z_0-9])([A-Za-z_0-9]+)\[\];/\1 *const \2 = (\1 *)emu_shared();/
