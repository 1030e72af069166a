// One access: is it inside something, may the thread make it, and is it ordered? For threads, atomics and asynchronous
// operations; and the registers that belong to a wgmma in flight.
#if defined(SIMT_CHECKED)
#include "check_access.h"

#include "check_counters.h"
#include "check_places.h"

namespace simt::model::check {

namespace {

struct Registers {
  const char *start, *end;
  bool written;
  Site site;
};
std::vector<std::vector<Registers>> flying;  // by thread of the gang

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

[[noreturn]] void out_of_bounds(const Access& access) {
  report(access, std::string("out-of-bounds ") + (access.write ? "write" : "read") + " of " + bytes_text(access.bytes) +
                     nearest(access.pointer));
}

void check_located(const Access& access, const Location& location) {
  switch (location.space) {
    case Space::shared: return check_shared(access, *location.block, location.offset);
    case Space::global: return check_global(access);
    case Space::static_shared:
      if (worker->gang.blocks.size() > 1)
        report(access, "a static __shared__ variable in blocks that run together (a cluster, or co_resident), which "
                       "would share it here: use simt::dynamic_shared");
      return check_static_shared(access, location.offset);
    case Space::constant:
      if (access.write) report(access, "write to " + name_of(access.pointer) + ", which kernels may only read");
      return;
    case Space::other_stack:
      report(access, std::string(access.write ? "write to" : "read of") + " a local variable of another thread");
    case Space::other_cluster:
      report(access, std::string(access.write ? "write to " : "read of ") + name_of(access.pointer) +
                         ", which is not in this cluster");
    case Space::nowhere: out_of_bounds(access);
  }
}

// A peer that has exited has given its shared memory back.
void check_alive(const Access& access, const Location& location, const Thread& thread) {
  if (location.space == Space::shared && location.block != thread.cta && !location.block->alive)
    report(access, std::string(access.write ? "write to " : "read of ") + name_of(access.pointer) +
                       ", whose block has exited");
}

Access by(Thread& thread, const void* pointer, size_t bytes, bool write, uint16_t place) {
  Access access{static_cast<const char*>(pointer), bytes, write};
  const Clock& clock = clock_of(thread);
  access.who = thread.index;
  access.tick = clock.tick;
  access.place = place;
  access.clock = &clock;
  return access;
}

}  // namespace

void check_generic(const void* pointer, size_t bytes, bool write, bool is_volatile, Thread& thread, uint16_t place) {
  Access access = by(thread, pointer, bytes, write, place);
  access.is_volatile = is_volatile;
  const Location location = locate(pointer, bytes, write, thread);
  check_alive(access, location, thread);
  if (is_volatile && location.space != Space::constant) {
    if (!write) volatile_access(pointer, location.space != Space::global, false, thread);
    access.tick = clock_of(thread).tick;
  }
  check_located(access, location);
  if (is_volatile && write) volatile_access(pointer, location.space != Space::global, true, thread);
  if (worker->options.counters)
    count_access(thread, place, location.space, location.block == thread.cta, pointer, bytes, write);
}

void touch(const void* pointer, size_t bytes, bool write, Thread& thread, Site site) {
  check_generic(pointer, bytes, write, false, thread, place_of(site));
}

void atomic(const void* pointer, size_t bytes, Thread& thread, Site site) {
  const uint16_t place = place_of(site);
  const Location location = locate(pointer, bytes, true, thread);
  check_alive(by(thread, pointer, bytes, true, place), location, thread);
  synchronise(pointer, location.space != Space::global, thread);
  Access access = by(thread, pointer, bytes, true, place);
  access.atomic = true;
  --access.tick;  // what it released holds the atomic itself
  check_located(access, location);
}

void async_access(Snapshot& snapshot, const void* pointer, size_t bytes, bool write, Cta* shared, Site issued,
                  bool atomic) {
  if (!bytes) return;
  Access access{static_cast<const char*>(pointer), bytes, write};
  access.who = snapshot.agent;
  access.tick = snapshot.tick;
  access.place = place_of(issued);
  access.clock = snapshot.clock.get();
  access.atomic = atomic;
  access.async = clocks.kind(snapshot.agent) != Agent::cp_async;
  const Thread& issuer = worker->gang.threads[snapshot.clock->issuer];
  if (!shared) return check_located(access, locate(pointer, bytes, write, issuer));
  const char* const async_view = shared->shared_async;
  const bool in_view = access.pointer >= async_view && access.pointer < async_view + shared->shared_bytes;
  const size_t offset = size_t(access.pointer - (in_view ? async_view : shared->shared));
  access.pointer = shared->shared + offset;
  if (offset + bytes > shared->shared_bytes) out_of_bounds(access);
  check_shared(access, *shared, offset);
}

// ---- registers ----
void in_flight(Thread& thread, const void* registers, size_t bytes, bool written, Site issued) {
  const char* start = static_cast<const char*>(registers);
  for (Registers& r : flying[thread.index])
    if (r.start == start && r.end == start + bytes && r.written == written) {
      r.site = issued;
      return;
    }
  flying[thread.index].push_back({start, start + bytes, written, issued});
}

void landed(Thread& thread) { flying[thread.index].clear(); }

bool any_in_flight(const Thread& thread) { return !flying[thread.index].empty(); }

void check_registers(const void* pointer, size_t bytes, bool write, const Thread& thread, uint16_t place) {
  const char* start = static_cast<const char*>(pointer);
  for (const Registers& r : flying[thread.index])
    if (start < r.end && start + bytes > r.start && (write || r.written))
      fail("registers of the wgmma issued at " + line_text(place_of(r.site)) + " are touched before wgmma_wait_group",
           read_line(place));
}

// ---- grids and gangs ----
void begin_grid(const void* kernel, const void* argument) {
  begin_module(kernel, argument);
  begin_global_shadow();
  forget_addresses();
}

void end_grid() {}

void begin_gang(Gang& gang) {
  const unsigned count = unsigned(gang.threads.size());
  ++clocks.gang;
  clocks.threads = count;
  clocks.blocks = unsigned(gang.blocks.size());
  clocks.block_threads = gang.blocks[0]->count;
  clocks.warpgroups_of_block = (clocks.block_threads + 127) / 128;
  clocks.thread.assign(count, {});
  for (unsigned i = 0; i < count; ++i) {
    clocks.thread[i].clock.self = i;
    clocks.thread[i].clock.tick = 1;
  }
  clocks.agent_tick.assign(lanes + clocks.blocks * clocks.warpgroups_of_block, 0);
  clocks.time = 0;
  clocks.mbarriers.clear();
  clocks.shared_addresses.clear();
  for (auto& registers : flying) registers.clear();
  if (flying.size() < count) flying.resize(count);
  begin_shadow();
  if (worker->options.counters) begin_counting(gang);
}

void end_gang(Gang&) {
  if (worker->options.counters) flush_counters();
}

}  // namespace simt::model::check
#endif
