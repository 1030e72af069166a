// Addresses of shared memory, its two views and the fences between them, buffers, and atomics.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "../cpu/dialect.h"
#include "state.h"

namespace simt {

#if !defined(SIMT_CHECKED)
void register_buffer(const void*, size_t, const char*) {}
void unregister_buffers() {}
#endif

namespace model {

Cta* owner(const void* pointer) {
  Cta* own = self() ? self()->cta : nullptr;
  if (own && own->contains(pointer)) return own;
  for (auto& block : worker->gang.blocks)
    if (block->contains(pointer)) return block.get();
  return nullptr;
}

uint32_t shared_address(const void* pointer, Site site) {
  const Cta& block = *self()->cta;
  if (!block.contains(pointer)) fail("a pointer that is not into the block's dynamic shared memory: " + where(pointer), site);
  return block.rank << 24 | (shared_window + uint32_t(static_cast<const char*>(pointer) - block.shared));
}

void* map_rank(void* pointer, uint32_t rank, Site site) {
  const Cta& block = *self()->cta;
  if (!block.contains(pointer)) fail("mapa of a pointer that is not into this block's shared memory: " + where(pointer), site);
  if (rank >= block.cluster->blocks.size())
    fail("mapa to block rank " + std::to_string(rank) + " of a cluster of " + std::to_string(block.cluster->blocks.size()), site);
  const Cta& target = *block.cluster->blocks[rank];
  if (!target.alive) fail("mapa to the shared memory of " + block_name(target) + ", which has exited", site);
  return target.shared + (static_cast<char*>(pointer) - block.shared);
}

// Most of it is as it was: comparing first is cheaper than writing all of it for each thread that fences.
void publish(Cta& block) {
  constexpr size_t step = 1024;
  for (size_t at = 0; at < block.shared_bytes; at += step) {
    const size_t bytes = std::min(step, block.shared_bytes - at);
    const char* const threads = block.shared + at;
    char* const async = block.shared_async + at;
    if (!memcmp(async, threads, bytes)) continue;
    size_t low = 0, high = bytes;
    while (async[low] == threads[low]) ++low;
    while (async[high - 1] == threads[high - 1]) --high;
    memcpy(async + low, threads + low, high - low);
    async_written_by_threads(block, uint32_t(at + low), uint32_t(at + high));
  }
}

// Publishes what all threads of the block have written so far; the checked build knows which writes were really fenced.
void fence_proxy_async(Site) {
  Inside inside;
  publish(*self()->cta);
  check::fence_proxy(*self());
}

void fence_memory(Site) {
  Inside inside;
  check::fence_memory(*self());
}

void touch(const void* pointer, size_t bytes, bool write, Site site) { check::touch(pointer, bytes, write, *self(), site); }

static void check_aligned(const void* pointer, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail("an atomic at an address that is not aligned: " + where(pointer), site);
}

void trap(Site site) { fail("__trap()", site); }

// Blocks run on several OS threads; a lock for all is enough at the speed of a model.
uint32_t load_acquire(const uint32_t* pointer, Site site) {
  poll(site);
  Inside inside;
  check_aligned(pointer, 4, site);
  check::load_acquire(pointer, 4, *self(), site);
  std::lock_guard lock(locks().atomics);
  return *pointer;
}

void store_release(uint32_t* pointer, uint32_t value, Site site) {
  Inside inside;
  check_aligned(pointer, 4, site);
  check::store_release(pointer, 4, *self(), site);
  std::lock_guard lock(locks().atomics);
  if (*pointer != value) progressed();
  *pointer = value;
}

template <class T>
T atomic_update(T* pointer, T (*change)(T, T, T), T operand, T compare, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");
  poll(site);
  Inside inside;
  check_aligned(pointer, sizeof(T), site);
  check::count(check::Count::atomics, 1, site);
  check::atomic(pointer, sizeof(T), *self(), site);
  std::lock_guard lock(locks().atomics);
  T old;
  memcpy(&old, pointer, sizeof(T));
  const T changed = change(old, operand, compare);
  if (memcmp(&old, &changed, sizeof(T))) progressed();
  memcpy(pointer, &changed, sizeof(T));
  return old;
}
#define INSTANTIATE(T) template T atomic_update<T>(T*, T (*)(T, T, T), T, T, Site);
INSTANTIATE(int)
INSTANTIATE(unsigned)
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(long)
INSTANTIATE(unsigned long)
INSTANTIATE(long long)
INSTANTIATE(unsigned long long)
#undef INSTANTIATE

}  // namespace model
}  // namespace simt
