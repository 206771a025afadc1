#include "library.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "buffer.h"
#include "format/format.h"
#include "format/pack.h"
#include "kernels/kernels.h"

namespace {

// Of a fixed size: to say that there is no memory must not take any.
thread_local std::array<char, 256> last_error;

[[gnu::format(printf, 1, 2)]] int fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error.data(), last_error.size(), format, arguments);
  va_end(arguments);
  return -1;
}

// C callers must see results only: whatever `body` throws becomes one.
template <class Body>
auto guarded(const Body& body) noexcept -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail("not enough memory");
  } catch (const std::exception& error) {
    return fail("%s", error.what());
  } catch (...) {
    return fail("unknown error");
  }
}

// Each thread starts on a contiguous share of a stage's items, as ONNX Runtime's do, and then helps with the shares of
// others; all threads meet between stages.
class Team {
 public:
  Team(const owl::Way& way, const owl::Product& product, int threads)
      : way_(way), product_(product), threads_(threads) {
    for (int i = 0; i < threads; ++i) workspaces_.emplace_back(way.workspace_bytes);
    shares_ = std::make_unique<Share[]>(static_cast<std::size_t>(threads));
  }

  // Throws std::system_error if there can be no more threads.
  void run(int repeats) {
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads_));
    try {
      for (int i = 1; i < threads_; ++i) others.emplace_back([this, i, repeats] { work(i, repeats); });
    } catch (...) {
      start_.store(kNever);
      for (std::thread& other : others) other.join();
      throw;
    }
    start_.store(kNow);
    work(0, repeats);
    for (std::thread& other : others) other.join();
  }

 private:
  enum Start { kNotYet, kNow, kNever };

  void work(int thread, int repeats) noexcept {
    while (start_.load() == kNotYet) std::this_thread::yield();
    if (start_.load() == kNever) return;
    std::byte* workspace = workspaces_[static_cast<std::size_t>(thread)].reserve(0);
    const owl::Header& h = product_.weights->header;
    const int stages = way_.stages(h, product_.tokens);
    for (int round = 0; round < repeats * stages; ++round) {
      const int stage = round % stages;
      const std::int64_t items = way_.items(h, product_.tokens, stage);
      for (int i = 0; i < threads_; ++i) {
        const int owner = (thread + i) % threads_;
        const std::int64_t first = items * owner / threads_, count = items * (owner + 1) / threads_ - first;
        std::atomic<std::int64_t>& taken = shares_[static_cast<std::size_t>(owner)].taken;
        for (std::int64_t n; (n = taken.fetch_add(1)) < count;) way_.run(product_, stage, first + n, workspace);
      }
      if (arrived_.fetch_add(1) + 1 == threads_) {
        arrived_.store(0);
        for (int i = 0; i < threads_; ++i) shares_[static_cast<std::size_t>(i)].taken.store(0);
        done_.store(round + 1);
      }
      while (done_.load() <= round) std::this_thread::yield();  // the one waited for may need this CPU
    }
  }

  const owl::Way& way_;
  const owl::Product& product_;
  int threads_;
  struct alignas(64) Share {
    std::atomic<std::int64_t> taken{0};
  };
  std::unique_ptr<Share[]> shares_;
  std::vector<owl::Buffer> workspaces_;
  std::atomic<Start> start_{kNotYet};
  std::atomic<int> arrived_{0}, done_{0};
};

}  // namespace

int owl_abi() { return kOwlAbi; }

const char* owl_instruction_sets() {
  static const std::array<char, 64> names = [] {
    std::array<char, 64> all{};
    std::size_t length = 0;
    for (const owl::Kernels* kernels : owl::runnable_kernels()) {
      const int written =
          std::snprintf(all.data() + length, all.size() - length, "%s%s", length == 0 ? "" : ",", kernels->name);
      length += static_cast<std::size_t>(written);
    }
    return all;
  }();
  return names.data();
}

std::int64_t owl_pack(const float* weights, std::int64_t rows, std::int64_t columns, int format, int paired,
                      std::uint8_t* out, std::int64_t capacity) {
  return guarded([&]() -> std::int64_t {
    if (!owl::is_format(format)) return fail("unknown weight format");
    const auto as = static_cast<owl::Format>(format);
    const auto r = static_cast<std::uint64_t>(rows), c = static_cast<std::uint64_t>(columns);
    const char* problem = nullptr;
    const auto most = static_cast<std::int64_t>(owl::most_bytes(r, c, as, paired != 0, problem));
    if (problem != nullptr) return fail("%s", problem);
    if (out == nullptr) return most;
    if (capacity < most) return fail("no room for the packed matrix");
    const std::uint64_t bytes = owl::pack(weights, r, c, as, paired != 0, out, problem);
    return problem == nullptr ? static_cast<std::int64_t>(bytes) : fail("%s", problem);
  });
}

int owl_check(const std::uint8_t* data, std::int64_t size) {
  return guarded([&] {
    owl::Packed packed;
    const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed);
    return problem == nullptr ? 0 : fail("%s", problem);
  });
}

int owl_unpack(const std::uint8_t* data, std::int64_t size, float* weights, std::uint8_t* mask) {
  return guarded([&] {
    owl::Packed packed;
    if (const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed)) return fail("%s", problem);
    owl::unpack(packed, weights, mask);
    return 0;
  });
}

std::int64_t owl_product(const std::uint8_t* data, std::int64_t size, const float* x, float* y, std::int64_t tokens,
                         const char* kernels, int threads, int repeats) {
  return guarded([&]() -> std::int64_t {
    owl::Packed packed;
    if (const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed)) return fail("%s", problem);
    const owl::Kernels* chosen = owl::find_kernels(kernels);
    if (chosen == nullptr) return fail("this CPU has no kernels called %s", kernels);
    if (tokens < 1 || threads < 1 || repeats < 1) return fail("tokens, threads and repeats are at least 1");
    const owl::Way& way = chosen->way(packed.header.format, tokens);
    owl::Buffer scratch(way.scratch_bytes(packed.header, tokens));
    const owl::Product product{&packed, x, y, tokens, scratch.reserve(0)};
    Team team(way, product, threads);
    const auto start = std::chrono::steady_clock::now();
    team.run(repeats);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  });
}

const char* owl_error() { return last_error.data(); }
