// Runs a compiled kernel: one threadgroup at a time, a fiber for each of its threads.
//
// The compiler calls `__tsan_*` before every access to memory and `__ubsan_*` where an index leaves
// an array. No sanitiser's library is linked: the functions of these names are below.
#include "scheduler.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

using namespace scheduler;

namespace {

constexpr size_t PAGE = 16384, STACK = 128 * 1024, MOST_THREADGROUP_MEMORY = 32768, RED_ZONE = 64;
constexpr uint32_t NOBODY = 0xffffffff, SEVERAL = 0xfffffffe;

enum State { READY, WAITING, DONE };
enum Order { ASCENDING, DESCENDING, RANDOM };

struct Fiber {
  Attributes attributes;
  ucontext_t start;
  jmp_buf jump;
  bool started;
  State state;
  int kind, line, flags;
  const char* name;
  int parity;  // of the operation that it meets others in
};

// The accesses to one element: the last write, and the last reads.
struct Cell {
  uint32_t write_group, write_thread, write_epoch, write_simdgroup_epoch;
  uint32_t read_group, read_thread, read_simdgroup, read_epoch, read_simdgroup_epoch;
  bool write_atomic, read_atomic;
};

struct Region {
  const char* name;
  char *begin, *end;
  size_t element;
  bool written_before;  // an input, or an output with an initial value
  bool in_threadgroup;
  std::vector<Cell> cells;
};

}  // namespace

extern "C" {
struct MetalBuffer {
  const char* name;
  void* host;
  size_t size, element, start;  // bytes; the kernel's pointer is `start` bytes after the lowest
  int output, initialised;
};
struct MetalLaunch {
  void (*body)(void**);
  const MetalBuffer* buffers;
  int buffer_count;
  uint32_t grid[3], group[3];
  int order;
  uint32_t seed;
  int at_end;  // of its pages does a buffer lie; else at their start
  int checks_accesses;
  uint16_t fill;  // of what nothing has written
  uint32_t most_milliseconds;  // of the processor; more are taken for a loop that does not end
};
struct MetalFailure {
  char text[1024];
  char thread[128];  // which it was; empty if it was several
  char file[512];
  uint64_t offset;  // of the failing instruction in the file; 0 if unknown
};
}

namespace {

const MetalLaunch* launch;
MetalFailure* failure;
sigjmp_buf escape;
jmp_buf scheduler_jump;
volatile bool running;
pthread_t runner;

std::vector<Fiber> fibers;
bool fibers_are_idle;
char* stacks;
size_t stack_count;
Fiber* current;
std::vector<Offers> offers;              // two for each simdgroup
std::vector<uint32_t> simdgroup_epochs;  // one for each simdgroup
uint32_t epochs[3], group_number, group_threads;
bool in_atomic;

char* arena;
size_t arena_size;
std::vector<Region> regions;
Region* latest_region;
char *group_memory, *group_memory_end;
size_t group_memory_used, group_memory_asked;
std::vector<std::pair<const void*, char*>> variables;
std::vector<void*> pointers;
uint32_t random_state;

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

[[noreturn]] void fail_at(const void* code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure->text, sizeof failure->text, format, arguments);
  va_end(arguments);
  failure->thread[0] = 0;
  if (current) {
    const Attributes& at = current->attributes;
    snprintf(failure->thread, sizeof failure->thread, "thread (%u, %u, %u) of threadgroup (%u, %u, %u)",
             at.position_in_group[0], at.position_in_group[1], at.position_in_group[2],
             at.group_position[0], at.group_position[1], at.group_position[2]);
  }
  Dl_info info;
  failure->offset = 0;
  failure->file[0] = 0;
  if (code && dladdr(code, &info) && info.dli_fname) {
    snprintf(failure->file, sizeof failure->file, "%s", info.dli_fname);
    failure->offset = uint64_t((const char*)code - (const char*)info.dli_fbase);
  }
  siglongjmp(escape, 1);
}

// ------------------------------------------------------------------------------------------ fibers

void __attribute__((noinline)) leave() {
  if (_setjmp(current->jump) == 0) _longjmp(scheduler_jump, 1);
}

// A fiber runs thread after thread: to begin one costs system calls.
void run_threads() {
  for (;;) {
    launch->body(pointers.data());
    current->state = DONE;
    leave();
  }
}

void __attribute__((noinline)) enter(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler_jump) == 0) {
    if (fiber->started) _longjmp(fiber->jump, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stacks + (fiber - fibers.data()) * (STACK + PAGE) + PAGE;
    fiber->start.uc_stack.ss_size = STACK;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, run_threads, 0);
    setcontext(&fiber->start);
  }
  current = nullptr;
}

void need_stacks(size_t count) {
  if (count <= stack_count) return;
  if (stacks) munmap(stacks, stack_count * (STACK + PAGE));
  void* place = mmap(nullptr, count * (STACK + PAGE), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks = place == MAP_FAILED ? nullptr : (char*)place;
  stack_count = stacks ? count : 0;
  if (!stacks) fail_at(nullptr, "no memory for the stacks of the threads");
  for (size_t i = 0; i < count; ++i) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
}

// ---------------------------------------------------------------------------------------- schedule

// Whether two waiting threads wait for the same thing.
bool same(const Fiber& a, const Fiber& b) {
  return a.kind == b.kind && a.line == b.line && strcmp(a.name, b.name) == 0;
}

// Lets the lanes of a simdgroup go on that have met; an error if they never will.
void settle(uint32_t first, uint32_t end) {
  const Fiber* waiting = nullptr;
  uint32_t active = 0, done = 0;
  for (uint32_t i = first; i < end; ++i) {
    if (fibers[i].state == READY) return;
    if (fibers[i].state == DONE) {
      ++done;
      continue;
    }
    active |= 1u << (i - first);
    if (!waiting || waiting->kind == THREADGROUP_BARRIER) waiting = &fibers[i];
  }
  if (!waiting || waiting->kind == THREADGROUP_BARRIER) return;
  for (uint32_t i = first; i < end; ++i)
    if (fibers[i].state == WAITING && !same(fibers[i], *waiting))
      fail_at(nullptr,
              "divergent lanes: lane %u of simdgroup %u waits in %s at line %d, lane %u in %s at line %d",
              waiting->attributes.lane, waiting->attributes.simdgroup, waiting->name, waiting->line,
              fibers[i].attributes.lane, fibers[i].name, fibers[i].line);
  if (waiting->kind == SIMDGROUP_BARRIER && done)
    fail_at(nullptr, "divergent lanes: simdgroup_barrier at line %d is not reached by %u lanes, which have returned",
            waiting->line, done);
  if (waiting->kind == MATRIX_OPERATION && active != 0xffffffff)
    fail_at(nullptr, "divergent lanes: %s at line %d needs all 32 lanes, and %d are active",
            waiting->name, waiting->line, __builtin_popcount(active));
  const uint32_t simdgroup = waiting->attributes.simdgroup;
  if (waiting->kind == SIMDGROUP_BARRIER) ++simdgroup_epochs[simdgroup];
  offers[2 * simdgroup + waiting->parity].active = active;
  for (uint32_t i = first; i < end; ++i)
    if (fibers[i].state == WAITING) fibers[i].state = READY;
}

void shuffle(std::vector<uint32_t>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

void arrange(std::vector<uint32_t>& order) {
  if (launch->order == RANDOM) shuffle(order);
}

std::vector<uint32_t> numbers(uint32_t count) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = launch->order == DESCENDING ? count - 1 - i : i;
  return order;
}

// Whether all threads of the group met at a barrier and go on.
bool pass_barrier() {
  const Fiber* waiting = nullptr;
  uint32_t done = 0;
  for (uint32_t i = 0; i < group_threads; ++i) {
    if (fibers[i].state == DONE) ++done;
    else if (!waiting) waiting = &fibers[i];
    else if (!same(*waiting, fibers[i]))
      fail_at(nullptr, "divergent threads: thread %u waits at the barrier of line %d, thread %u at that of line %d",
              waiting->attributes.index_in_group, waiting->line, i, fibers[i].line);
  }
  if (!waiting) return false;
  if (done)
    fail_at(nullptr, "threadgroup_barrier at line %d is not reached by %u of %u threads, which have returned",
            waiting->line, done, group_threads);
  for (int memory : {DEVICE_MEMORY, THREADGROUP_MEMORY})
    if (waiting->flags & memory) ++epochs[memory];
  for (uint32_t i = 0; i < group_threads; ++i) fibers[i].state = READY;
  return true;
}

void run_group() {
  const uint32_t simdgroups = (group_threads + LANES - 1) / LANES;
  std::vector<uint32_t> order = numbers(simdgroups), lanes = numbers(LANES);
  do {
    for (bool progress = true; progress;) {
      progress = false;
      arrange(order);
      for (uint32_t s : order) {
        const uint32_t first = s * LANES, end = std::min(first + LANES, group_threads);
        for (bool ran = true; ran;) {
          ran = false;
          arrange(lanes);
          for (uint32_t lane : lanes) {
            const uint32_t i = first + lane;
            if (i < end && fibers[i].state == READY) enter(&fibers[i]), ran = true;
          }
          if (ran) settle(first, end);
          progress |= ran;
          if (launch->order == RANDOM) break;
        }
      }
    }
  } while (pass_barrier());
}

void fill_unwritten(char* place, size_t size) {
  uint16_t* words = (uint16_t*)place;
  std::fill(words, words + (size + 1) / 2, launch->fill);
}

void prepare_group(const uint32_t position[3], const uint32_t groups[3]) {
  uint32_t size[3];
  for (int a = 0; a < 3; ++a)
    size[a] = std::min(launch->group[a], launch->grid[a] - position[a] * launch->group[a]);
  group_threads = size[0] * size[1] * size[2];
  const uint32_t dispatched = launch->group[0] * launch->group[1] * launch->group[2];
  ++group_number;
  memset(epochs, 0, sizeof epochs);
  const uint32_t simdgroups = (group_threads + LANES - 1) / LANES;
  simdgroup_epochs.assign(simdgroups, 0);
  offers.resize(2 * simdgroups);
  for (uint32_t i = 0; i < group_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = READY, fiber.parity = 0;
    Attributes& at = fiber.attributes;
    const uint32_t place[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int a = 0; a < 3; ++a) {
      at.position_in_group[a] = place[a];
      at.group_position[a] = position[a];
      at.position_in_grid[a] = position[a] * launch->group[a] + place[a];
      at.grid_size[a] = launch->grid[a];
      at.group_size[a] = size[a];
      at.dispatched_group_size[a] = launch->group[a];
      at.groups[a] = groups[a];
    }
    at.index_in_group = i, at.lane = i % LANES, at.simdgroup = i / LANES;
    at.simdgroups = simdgroups, at.dispatched_simdgroups = (dispatched + LANES - 1) / LANES;
  }
  fill_unwritten(group_memory, group_memory_used);
}

// ------------------------------------------------------------------------------------------ memory

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

void make_memory() {
  arena_size = 2 * MOST_THREADGROUP_MEMORY + 2 * PAGE;
  for (int i = 0; i < launch->buffer_count; ++i) arena_size += round_up(launch->buffers[i].size + 1, PAGE) + PAGE;
  void* place = mmap(nullptr, arena_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  arena = place == MAP_FAILED ? nullptr : (char*)place;
  if (!arena) fail_at(nullptr, "no memory for the buffers");
  char* next = arena + PAGE;
  const auto take = [&next](size_t size) {
    char* pages = next;
    mprotect(pages, size, PROT_READ | PROT_WRITE);
    next += size + PAGE;
    return pages;
  };
  regions.clear();
  regions.reserve(launch->buffer_count + 256);
  pointers.clear();
  latest_region = nullptr;
  for (int i = 0; i < launch->buffer_count; ++i) {
    const MetalBuffer& buffer = launch->buffers[i];
    const size_t pages = round_up(std::max<size_t>(buffer.size, 1), PAGE);
    char* begin = take(pages);
    fill_unwritten(begin, pages);
    char* data = launch->at_end ? begin + pages - buffer.size : begin;
    if (!buffer.output || buffer.initialised) memcpy(data, buffer.host, buffer.size);
    if (!buffer.output) mprotect(begin, pages, PROT_READ);
    regions.push_back({buffer.name, data, data + buffer.size, buffer.element, !buffer.output || buffer.initialised, false, {}});
    if (launch->checks_accesses && buffer.output) regions.back().cells.resize(buffer.size / buffer.element);
    pointers.push_back(data + buffer.start);
  }
  group_memory = take(2 * MOST_THREADGROUP_MEMORY);
  group_memory_end = group_memory + 2 * MOST_THREADGROUP_MEMORY;
  group_memory_used = RED_ZONE, group_memory_asked = 0;
  variables.clear();
}

void free_memory() {
  if (arena) munmap(arena, arena_size);
  arena = nullptr;
  regions.clear();
}

Region* region_of(char* place) {
  if (latest_region && place >= latest_region->begin && place < latest_region->end) return latest_region;
  for (Region& region : regions)
    if (place >= region.begin && place < region.end) return latest_region = &region;
  return nullptr;
}

[[noreturn]] void fail_outside(char* place, size_t size, bool writes, const void* code) {
  const char* verb = writes ? "writes" : "reads";
  const Region* nearest = nullptr;
  size_t distance = ~size_t(0);
  for (const Region& region : regions) {
    const size_t d = place < region.begin ? region.begin - place : place + size - region.end;
    if (d < distance) nearest = &region, distance = d;
  }
  if (!nearest) fail_at(code, "%s outside of every buffer", verb);
  if (place < nearest->begin)
    fail_at(code, "%s out of bounds: %zu bytes before the start of %s", verb, size_t(nearest->begin - place), nearest->name);
  fail_at(code, "%s out of bounds: %zu bytes after the start of %s, which has %zu bytes", verb,
          size_t(place - nearest->begin), nearest->name, size_t(nearest->end - nearest->begin));
}

// Whether a barrier lies between an earlier access of the same threadgroup and one now.
bool ordered(uint32_t thread, uint32_t simdgroup, uint32_t epoch, uint32_t simdgroup_epoch, uint32_t now) {
  if (thread == current->attributes.index_in_group || epoch < now) return true;
  const uint32_t own = current->attributes.simdgroup;
  return simdgroup == own && simdgroup_epoch < simdgroup_epochs[own];
}

void check_cell(Region& region, Cell& cell, bool writes, const void* code) {
  const Attributes& at = current->attributes;
  const uint32_t epoch = epochs[region.in_threadgroup ? THREADGROUP_MEMORY : DEVICE_MEMORY];
  const uint32_t own_epoch = simdgroup_epochs[at.simdgroup];
  // Threadgroup memory is new in each group, and device memory is not.
  const bool written = cell.write_group && (!region.in_threadgroup || cell.write_group == group_number);
  const bool read = cell.read_group && (!region.in_threadgroup || cell.read_group == group_number);
  if (!writes && !written && !region.written_before)
    fail_at(code, "reads %s, which nothing has written", region.name);
  const uint32_t writer_simdgroup = cell.write_thread / LANES;
  // Lanes of one simdgroup may write the same value; another value would show in the results.
  if (written && !(in_atomic && cell.write_atomic) && !(writes && cell.write_group == group_number && writer_simdgroup == at.simdgroup)) {
    if (cell.write_group != group_number)
      fail_at(code, "race: two threadgroups use %s, and one of them writes it", region.name);
    if (!ordered(cell.write_thread, writer_simdgroup, cell.write_epoch, cell.write_simdgroup_epoch, epoch))
      fail_at(code, "race: %s %s, which thread %u has written without a barrier between", writes ? "writes" : "reads",
              region.name, cell.write_thread);
  }
  if (writes && read && !(in_atomic && cell.read_atomic)) {
    if (cell.read_group != group_number)
      fail_at(code, "race: two threadgroups use %s, and one of them writes it", region.name);
    if (!ordered(cell.read_thread, cell.read_simdgroup, cell.read_epoch, cell.read_simdgroup_epoch, epoch))
      fail_at(code, "race: writes %s, which another thread has read without a barrier between", region.name);
  }
  if (writes) {
    cell.write_group = group_number, cell.write_thread = at.index_in_group;
    cell.write_epoch = epoch, cell.write_simdgroup_epoch = own_epoch, cell.write_atomic = in_atomic;
    return;
  }
  const bool others = read && cell.read_group == group_number && cell.read_epoch == epoch;
  cell.read_atomic = in_atomic && (!others || cell.read_atomic);
  cell.read_thread = others && cell.read_thread != at.index_in_group ? SEVERAL : at.index_in_group;
  cell.read_simdgroup = others && cell.read_simdgroup != at.simdgroup ? SEVERAL : at.simdgroup;
  cell.read_group = group_number, cell.read_epoch = epoch, cell.read_simdgroup_epoch = own_epoch;
}

inline void access(void* address, size_t size, bool writes, const void* code) {
  char* place = (char*)address;
  if (!current || size_t(place - arena) >= arena_size) return;
  if (launch->checks_accesses) {
    Region* region = region_of(place);
    if (!region || place + size > region->end) fail_outside(place, size, writes, code);
    if (!region->cells.empty()) {
      const size_t first = (place - region->begin) / region->element;
      const size_t last = (place + size - 1 - region->begin) / region->element;
      for (size_t i = first; i <= last; ++i) check_cell(*region, region->cells[i], writes, code);
    }
  }
  // Between any two accesses other threads may run.
  if (launch->order == RANDOM && !in_atomic && random_number() % 4 == 0) leave();
}

// ----------------------------------------------------------------------------------------- signals

constexpr int TIME_OVER = SIGVTALRM;

// Interrupts this thread when it has used so much of the processor, and again if that was too early.
struct Timer {
  timer_t id;
  explicit Timer(uint32_t milliseconds) {
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = TIME_OVER;
    event._sigev_un._tid = pid_t(syscall(SYS_gettid));
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &id);
    itimerspec time = {};
    time.it_value = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    time.it_interval = {0, 1000000L};
    timer_settime(id, 0, &time, nullptr);
  }
  void stop() { timer_delete(id); }
};

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!running || !pthread_equal(pthread_self(), runner)) {
    ::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  const void* code = nullptr;
#if defined(__x86_64__)
  code = (const void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  code = (const void*)((ucontext_t*)context)->uc_mcontext.pc;
#endif
  if (signal == TIME_OVER) {
    // Elsewhere the scheduler is at work, which ends soon.
    if (current) fail_at(code, "does not end within %u ms", launch->most_milliseconds);
    return;
  }
  if (signal == SIGFPE) fail_at(code, "divides an integer by zero");
  if (signal == SIGILL || signal == SIGTRAP) fail_at(code, "reaches code that it must not reach");
  char* place = (char*)info->si_addr;
  if (stacks && place >= stacks && place < stacks + stack_count * (STACK + PAGE))
    fail_at(code, "needs more than %zu bytes of private memory in a thread", STACK);
  for (const Region& region : regions)
    if (place >= region.begin && place < region.end) fail_at(code, "writes to the input %s", region.name);
  fail_at(code, "accesses memory outside of its buffers");
}

}  // namespace

extern "C" {

const Attributes& metal_attributes() { return current->attributes; }

void metal_fail(const char* text) { fail_at(__builtin_return_address(0), "%s", text); }

void metal_atomic(bool begins) { in_atomic = begins; }

const Offers* metal_meet(int kind, const char* name, int line, int flags, const void* value, size_t size) {
  Fiber& fiber = *current;
  // Lanes leave an operation one by one, and the first may offer to the next one already.
  fiber.parity ^= 1;
  Offers* place = &offers[2 * fiber.attributes.simdgroup + fiber.parity];
  if (size) memcpy(place->values[fiber.attributes.lane], value, size);
  fiber.kind = kind, fiber.name = name, fiber.line = line, fiber.flags = flags;
  fiber.state = WAITING;
  leave();
  return place;
}

void* metal_threadgroup_memory(const void* variable, size_t size, size_t alignment) {
  for (const auto& known : variables)
    if (known.first == variable) return known.second;
  group_memory_asked += round_up(size, std::max<size_t>(alignment, 4));
  if (group_memory_asked > MOST_THREADGROUP_MEMORY)
    fail_at(nullptr, "needs %zu bytes of threadgroup memory, and Metal has %zu", group_memory_asked, MOST_THREADGROUP_MEMORY);
  char* begin = group_memory + round_up(group_memory_used, 16);
  group_memory_used = begin + size - group_memory + RED_ZONE;
  if (group_memory_used > 2 * MOST_THREADGROUP_MEMORY) fail_at(nullptr, "has too many variables in threadgroup memory");
  regions.push_back({"threadgroup memory", begin, begin + size, 1, false, true, {}});
  if (launch->checks_accesses) regions.back().cells.resize(size);
  fill_unwritten(begin, size);
  variables.push_back({variable, begin});
  return begin;
}

// Runs a kernel; returns 0, or 1 with the reason in `why`.
int metal_launch(const MetalLaunch* what, MetalFailure* why) {
  launch = what, failure = why;
  current = nullptr, in_atomic = false;
  group_number = 0;
  random_state = what->seed * 2654435761u + 1;
  runner = pthread_self();
  constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, TIME_OVER};
  constexpr int COUNT = sizeof SIGNALS / sizeof SIGNALS[0];
  struct sigaction action = {}, before[COUNT];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  static char handler_stack[64 * 1024];
  stack_t alternative = {}, previous_stack;
  alternative.ss_sp = handler_stack, alternative.ss_size = sizeof handler_stack;
  sigaltstack(&alternative, &previous_stack);
  for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &action, &before[i]);
  running = true;
  volatile int result = 0;
  Timer timer(what->most_milliseconds);
  if (sigsetjmp(escape, 1) == 0) {
    uint32_t groups[3];
    for (int a = 0; a < 3; ++a) groups[a] = (what->grid[a] + what->group[a] - 1) / what->group[a];
    const size_t threads = size_t(what->group[0]) * what->group[1] * what->group[2];
    const bool new_stacks = stack_count < threads;
    need_stacks(threads);
    if (fibers.size() < threads) fibers.resize(threads);
    if (!fibers_are_idle || new_stacks)
      for (Fiber& fiber : fibers) fiber.started = false;
    fibers_are_idle = false;
    make_memory();
    std::vector<uint32_t> order = numbers(groups[0] * groups[1] * groups[2]);
    arrange(order);
    for (uint32_t group : order) {
      const uint32_t position[3] = {group % groups[0], group / groups[0] % groups[1], group / (groups[0] * groups[1])};
      prepare_group(position, groups);
      run_group();
    }
    fibers_are_idle = true;  // and not in the middle of a thread, as after a failure
    for (int i = 0; i < what->buffer_count; ++i)
      if (what->buffers[i].output) memcpy(what->buffers[i].host, regions[i].begin, what->buffers[i].size);
  } else {
    result = 1;
  }
  timer.stop();
  running = false;
  current = nullptr;
  for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
  free_memory();
  return result;
}

// ------------------------------------------------------------------- what the compiler inserts

#define HOOK(name, size, writes) \
  void __tsan_##name(void* address) { access(address, size, writes, __builtin_return_address(0)); }
#define HOOKS(size)                                                                            \
  HOOK(read##size, size, false) HOOK(write##size, size, true) HOOK(unaligned_read##size, size, false) \
  HOOK(unaligned_write##size, size, true) HOOK(volatile_read##size, size, false)               \
  HOOK(volatile_write##size, size, true)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* address, size_t size) { access(address, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* address, size_t size) { access(address, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}

void __ubsan_handle_out_of_bounds_abort(void*, size_t index) {
  fail_at(__builtin_return_address(0), "index %zd is out of bounds of an array", ssize_t(index));
}
void __ubsan_handle_shift_out_of_bounds_abort(void*, size_t, size_t by) {
  fail_at(__builtin_return_address(0), "shifts by %zd bits", ssize_t(by));
}
void __ubsan_handle_divrem_overflow_abort(void*, size_t, size_t) {
  fail_at(__builtin_return_address(0), "divides an integer by zero");
}
}
