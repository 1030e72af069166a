// What every kernel includes: the CUDA dialect for the compiler at hand, and the few names plain CUDA lacks.
//
//   nvcc   gpu.cuh             the real thing
//   g++    cpu/dialect.h       the same words as C++; the model in model/ does what the hardware would
//
// Both sides give:  simt::launch(kernel, simt::Launch{...}, arguments...)      host: starts a grid
//                   simt::dynamic_shared<T>()                                  device: the block's shared memory
//                   simt::tensor_map(...)                                      host: describes a tensor to TMA
//                   simt::multiprocessors()                                    host: how many SMs there are
// A kernel holds no `asm` and no `#ifdef`: instructions are in ptx.cuh. Shared memory comes from dynamic_shared<T>();
// a static `__shared__` works too, where threads alone use it: mbarriers, TMA and wgmma refuse it, and in clusters, or with
// co_resident, the blocks that share an OS thread would share it (the checked build refuses that).
#pragma once
#include "types.h"

#if defined(__CUDACC__)
#include "gpu.cuh"
#else
#include "cpu/dialect.h"
#endif
