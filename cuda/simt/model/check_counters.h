// Counting what warps ask of memory (Options.counters). Lanes that make the same access for the n-th time are one
// request.
#pragma once
#include "check_regions.h"

namespace simt::model::check {

void begin_counting(const Gang& gang);
void count_access(const Thread& thread, uint16_t place, Space space, bool own_block, const void* pointer, size_t bytes,
                  bool write);
void flush_counters();  // the blocks have ended: what lanes did without the others of their warp

}  // namespace simt::model::check
