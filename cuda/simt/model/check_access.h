// An access by the running thread, as the compiler's hooks and the model see it.
#pragma once
#include "check_shadow.h"

namespace simt::model::check {

// Checks one access of a kernel; raises Error. Its own stack has been dealt with.
void check_generic(const void* pointer, size_t bytes, bool write, bool is_volatile, Thread& thread, uint16_t place);
bool any_watched(const Thread& thread);  // are registers of a wgmma, which lie on its stack?
void check_registers(const void* pointer, size_t bytes, bool write, const Thread& thread, uint16_t place);

}  // namespace simt::model::check
