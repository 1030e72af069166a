// What lies where: shared memory, registered buffers, the module's own data, stacks. Tells a legal address from one
// that is out of bounds, and names both.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "state.h"

namespace simt::model::check {

enum class Space : uint8_t {
  shared,      // dynamic shared memory of a block of the gang
  static_shared,
  global,      // a registered buffer, or a variable of the module
  constant,    // read-only data and kernel arguments: nothing to check
  other_stack, // a local variable of another thread
  other_cluster,  // shared memory of a block of another cluster
  nowhere,
};

struct Location {
  Space space = Space::nowhere;
  Cta* block = nullptr;  // of `shared`
  size_t offset = 0;     // in it, or in the module's thread-local storage
};

void begin_module(const void* kernel, const void* argument);  // finds the kernel's module
// The thread's own stack is not asked for here. `bytes` must all lie in one region.
Location locate(const void* pointer, size_t bytes, bool write, const Thread& thread);
bool is_models_own(const void* pointer);  // thread-local variables of the model that kernels read: `current`
std::string name_of(const void* pointer);
std::string nearest(const void* pointer);  // ", 0 bytes past the end of C (262144 bytes)"; empty if nothing is near

}  // namespace simt::model::check
