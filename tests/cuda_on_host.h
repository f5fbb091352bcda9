// Runs CUDA kernels on the host, thread by thread, to test their logic where there is no GPU: index walks, vector widths,
// tails, barriers. Blocks run one after another; the threads of a block are coroutines that yield at every barrier.
//
// A thread runs from barrier to barrier in one go; tests run the threads in both orders, so that most missing barriers show.
// What this cannot show: everything that depends on finer interleaving, on the device's memory model, or on time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>

struct Place { unsigned x; };
inline Place threadIdx, blockIdx;

#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define HIERA_TRAP() throw std::runtime_error("trap")

namespace host_cuda {

constexpr unsigned kThreads = 256;
constexpr size_t kStack = 64 << 10;

inline bool backwards = false;  // the order in which a block's threads take their turns

// One coroutine per thread, kept for all blocks of all launches. Jumps between them by setjmp: swapcontext would enter the
// operating system at every turn.
class Block {
 public:
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    trapped_ = false;
    for (auto& running : running_) running = true;
    for (bool any = true; any;) {
      any = false;
      for (unsigned i = 0; i < kThreads; ++i) {
        const unsigned t = backwards ? kThreads - 1 - i : i;
        if (!running_[t]) continue;
        any = true;
        resume(t);
      }
    }
    if (trapped_) throw std::runtime_error("trap");
  }

  void yield() {
    if (_setjmp(turn_[threadIdx.x]) == 0) _longjmp(main_, 1);
  }

 private:
  void resume(unsigned t) {
    threadIdx.x = t;
    if (_setjmp(main_) != 0) return;
    if (started_[t]) _longjmp(turn_[t], 1);
    started_[t] = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = std::malloc(kStack);
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::thread, 0);
    setcontext(&context);
  }

  static void thread();

  jmp_buf main_, turn_[kThreads];
  bool started_[kThreads] = {}, running_[kThreads] = {}, trapped_ = false;
  const std::function<void()>* kernel_ = nullptr;
};

inline Block block;

inline void Block::thread() {
  for (;;) {
    try {
      (*block.kernel_)();
    } catch (...) {
      block.trapped_ = true;
    }
    block.running_[threadIdx.x] = false;
    block.yield();
  }
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  if (threads != kThreads) throw std::runtime_error("a block of another size");
  const std::function<void()> call = kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) block.run(call);
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::block.yield(); }

#define HIERA_LAUNCH(kernel, blocks, threads, stream, ...) \
  host_cuda::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); })
