// Runs CUDA kernels on the host, thread by thread, to test their logic where there is no GPU: index walks, vector widths,
// tails, barriers. Blocks run one after another; the threads of a block are coroutines that yield at every barrier.
//
// What this cannot show: races between threads that a barrier should have separated and happens to (each thread runs from
// barrier to barrier in turn, in a chosen order: forward and backward orders are both run and must agree), alignment faults
// (checked by the buffers' real alignment only under -fsanitize=alignment), and anything about speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

struct Place { unsigned x; };
inline Place threadIdx, blockIdx;

#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define HIERA_TRAP() throw std::runtime_error("trap")

namespace host_cuda {

inline bool backwards = false;  // the order in which a block's threads take their turns
inline int64_t launches = 0;

class Block {
 public:
  explicit Block(unsigned threads) : contexts_(threads), stacks_(threads), running_(threads) {
    for (auto& stack : stacks_) stack = std::make_unique<char[]>(kStack);
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    current_ = this;
    const unsigned threads = static_cast<unsigned>(contexts_.size());
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_[t].get();
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = &main_;
      makecontext(&contexts_[t], reinterpret_cast<void (*)()>(&Block::enter), 0);
      running_[t] = true;
    }
    for (bool any = true; any;) {
      any = false;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = backwards ? threads - 1 - i : i;
        if (!running_[t]) continue;
        any = true;
        threadIdx.x = t;
        swapcontext(&main_, &contexts_[t]);
      }
      if (trapped_) throw std::runtime_error("trap");
    }
  }

  static void barrier() {
    const unsigned self = threadIdx.x;
    swapcontext(&current_->contexts_[self], &current_->main_);
  }

 private:
  static void enter() {
    try {
      (*current_->kernel_)();
    } catch (...) {
      current_->trapped_ = true;
    }
    current_->running_[threadIdx.x] = false;
  }

  static constexpr size_t kStack = 64 << 10;
  static inline Block* current_ = nullptr;
  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<bool> running_;
  ucontext_t main_;
  const std::function<void()>* kernel_ = nullptr;
  bool trapped_ = false;
};

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  ++launches;
  Block block(threads);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    block.run(kernel);
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::Block::barrier(); }

#define HIERA_LAUNCH(kernel, blocks, threads, stream, ...) \
  host_cuda::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); })
