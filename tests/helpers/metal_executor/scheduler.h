// What a compiled kernel and the scheduler know of each other; see `metal_executor/__init__.py`.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace scheduler {

constexpr int LANES = 32;  // threads of a simdgroup
constexpr int SLOT = 64;   // bytes that a lane can offer to the others of its simdgroup
constexpr int THREADGROUP_BARRIER = 1, SIMDGROUP_BARRIER = 2, OPERATION = 3, MATRIX_OPERATION = 4;
constexpr int DEVICE_MEMORY = 1, THREADGROUP_MEMORY = 2;  // the bits of mem_flags

// The attributes of one thread, as Metal gives them to a kernel.
struct Attributes {
  uint32_t position_in_grid[3], position_in_group[3], group_position[3];
  uint32_t grid_size[3], group_size[3], dispatched_group_size[3], groups[3];
  uint32_t index_in_group, lane, simdgroup, simdgroups, dispatched_simdgroups;
};

// What the lanes of a simdgroup offered to one operation.
struct Offers {
  uint32_t active;  // a bit for each lane that takes part
  alignas(16) unsigned char values[LANES][SLOT];
};

extern "C" {
const Attributes& metal_attributes();
// Waits until the threads that belong together have reached the same operation.
const Offers* metal_meet(int kind, const char* name, int line, int flags, const void* value, size_t size);
void* metal_threadgroup_memory(const void* variable, size_t size, size_t alignment);
void metal_atomic(bool begins);
[[noreturn]] void metal_fail(const char* text);
}

}  // namespace scheduler
