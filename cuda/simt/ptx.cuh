// One function per PTX instruction: nvcc gets the instruction, g++ gets the model. All `asm` of the room is below here.
//
//   ptx/core.cuh      how the two sides are told apart; shared-memory addresses; clusters; elect; registers; clock
//   ptx/barrier.cuh   named barriers, cluster barriers, mbarrier, fences
//   ptx/copy.cuh      TMA in one to five dimensions, bulk copies, cp.async
//   ptx/matrix.cuh    ldmatrix, stmatrix, mma.sync
//   ptx/wgmma.cuh     descriptors and wgmma for every N
//
// Names follow the PTX ISA (9.0). Pointers are generic; addresses in shared memory are computed here.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/core.cuh"
#include "ptx/matrix.cuh"
#include "ptx/wgmma.cuh"
