// Registered buffers, the kernel's module, and where an address lies among them.
#if defined(SIMT_CHECKED)
#include "check_regions.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <vector>

#include "check_shadow.h"

namespace simt {

namespace {

struct Buffer {
  const char* start;
  size_t bytes;
  std::string name;
  const char* end() const { return start + bytes; }
  bool holds(const char* pointer, size_t count) const { return pointer >= start && pointer + count <= end(); }
};
std::vector<Buffer> buffers;  // ascending
size_t last_buffer = 0;

}  // namespace

void register_buffer(const void* pointer, size_t bytes, const char* name) {
  std::lock_guard lock(model::locks().grid);
  Buffer buffer{static_cast<const char*>(pointer), bytes, name};
  auto after = std::lower_bound(buffers.begin(), buffers.end(), buffer.start,
                                [](const Buffer& b, const char* start) { return b.start < start; });
  buffers.insert(after, buffer);
}

void unregister_buffers() {
  std::lock_guard lock(model::locks().grid);
  buffers.clear();
  model::check::forget_global_shadow();
}

namespace model::check {

namespace {

struct Segment {
  const char *start, *end;
  bool writable, of_kernel;
  bool holds(const char* pointer, size_t bytes) const { return pointer >= start && pointer + bytes <= end; }
};
std::vector<Segment> segments;
const char *static_shared_start = nullptr, *static_shared_end = nullptr;
const char* arguments = nullptr;
constexpr size_t argument_bytes = 4096 + 256;  // CUDA's limit, and the function pointer beside them

const Buffer* buffer_of(const char* pointer, size_t bytes) {
  if (last_buffer < buffers.size() && buffers[last_buffer].holds(pointer, bytes)) return &buffers[last_buffer];
  // Buffers may overlap (views of one tensor): any that holds all bytes will do.
  for (size_t i = 0; i < buffers.size(); ++i)
    if (buffers[i].holds(pointer, bytes)) {
      last_buffer = i;
      return &buffers[i];
    }
  return nullptr;
}

int add_module(dl_phdr_info* info, size_t, void* kernel) {
  const auto address = [&](uint64_t offset) { return reinterpret_cast<const char*>(info->dlpi_addr + offset); };
  bool of_kernel = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const char *start = address(header.p_vaddr), *end = start + header.p_memsz;
    if (header.p_type == PT_LOAD && kernel >= start && kernel < end) of_kernel = true;
  }
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD)
      segments.push_back({address(header.p_vaddr), address(header.p_vaddr + header.p_memsz),
                          (header.p_flags & PF_W) != 0, of_kernel});
    if (header.p_type == PT_TLS && of_kernel && info->dlpi_tls_data) {
      static_shared_start = static_cast<const char*>(info->dlpi_tls_data);
      static_shared_end = static_shared_start + header.p_memsz;
    }
  }
  return 0;
}

std::string distance(const char* pointer, const char* start, size_t bytes, const std::string& name, size_t& best) {
  const bool before = pointer < start;
  const size_t away = before ? size_t(start - pointer) : size_t(pointer - start);
  const size_t bytes_away = before ? away : away < bytes ? 0 : away - bytes;
  if (bytes_away >= best) return "";
  best = bytes_away;
  const std::string size = name + " (" + std::to_string(bytes) + " bytes)";
  if (before) return ", " + std::to_string(bytes_away) + " bytes before " + size;
  if (away < bytes) return ", across the end of " + size;
  return ", " + std::to_string(bytes_away) + " bytes past the end of " + size;
}

}  // namespace

void begin_module(const void* kernel, const void* argument) {
  arguments = static_cast<const char*>(argument);
  segments.clear();
  static_shared_start = static_shared_end = nullptr;
  dl_iterate_phdr(add_module, const_cast<void*>(kernel));
}

bool is_models_own(const void* pointer) { return pointer == &current || pointer == &worker; }

Location locate(const void* pointer, size_t bytes, bool write, const Thread& thread) {
  const char* const p = static_cast<const char*>(pointer);
  const auto in_block = [&](Cta& block) { return p >= block.shared && p + bytes <= block.shared + block.shared_bytes; };
  Cta& own = *thread.cta;
  if (in_block(own)) return {Space::shared, &own, size_t(p - own.shared)};
  if (buffer_of(p, bytes)) return {Space::global, nullptr, 0};
  if (p >= static_shared_start && p + bytes <= static_shared_end)
    return {Space::static_shared, &own, size_t(p - static_shared_start)};
  for (auto& block : own.gang->blocks)
    if (in_block(*block)) {
      const Space space = block->cluster == own.cluster ? Space::shared : Space::other_cluster;
      return {space, block.get(), size_t(p - block->shared)};
    }
  const char* const threads = reinterpret_cast<const char*>(own.gang->threads.data());
  if (p >= threads && p < threads + own.gang->threads.size() * sizeof(Thread)) return {Space::constant, nullptr, 0};
  if (!write && p >= arguments && p < arguments + argument_bytes) return {Space::constant, nullptr, 0};
  for (const Segment& segment : segments)
    if (segment.holds(p, bytes)) {
      if (!segment.writable && !write) return {Space::constant, nullptr, 0};
      if (segment.writable && segment.of_kernel) return {Space::global, nullptr, 0};
      if (!write) return {Space::constant, nullptr, 0};
    }
  for (auto& fiber : worker->fibers)
    if (fiber->holds(p)) return {Space::other_stack, nullptr, 0};
  return {};
}

std::string name_of(const void* pointer) {
  const char* const p = static_cast<const char*>(pointer);
  if (p >= static_shared_start && p < static_shared_end) {
    char text[48];
    snprintf(text, sizeof text, "__shared__ memory at +0x%zx", size_t(p - static_shared_start));
    return text;
  }
  if (const Buffer* buffer = buffer_of(p, 1))
    return buffer->name + "+" + std::to_string(p - buffer->start) + " (of " + std::to_string(buffer->bytes) + " bytes)";
  Dl_info info;
  if (!owner(p) && dladdr(p, &info) && info.dli_sname) {
    const long offset = p - static_cast<const char*>(info.dli_saddr);
    return std::string("variable ") + info.dli_sname + (offset ? "+" + std::to_string(offset) : "");
  }
  for (const Segment& segment : segments)
    if (segment.of_kernel && segment.holds(p, 1)) return "a variable of the kernel's module at " + where(p);
  return where(p);
}

std::string nearest(const void* pointer) {
  const char* const p = static_cast<const char*>(pointer);
  size_t best = 1 << 20;
  std::string text;
  const auto look = [&](const char* start, size_t bytes, const std::string& name) {
    const std::string found = distance(p, start, bytes, name, best);
    if (!found.empty()) text = found;
  };
  for (const Buffer& buffer : buffers) look(buffer.start, buffer.bytes, buffer.name);
  for (auto& block : worker->gang.blocks)
    look(block->shared, block->shared_bytes,
         "the shared memory of " + (self() && self()->cta == block.get() ? "the block" : block_name(*block)));
  if (static_shared_end > static_shared_start)
    look(static_shared_start, size_t(static_shared_end - static_shared_start), "the static __shared__ memory");
  return text;
}

}  // namespace model::check
}  // namespace simt
#endif
