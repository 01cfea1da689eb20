// A small thread pool for callers without torch: threads that sleep until a kernel has work for them.
//
// The caller works too, so a pool of N has N - 1 threads. Work is cut into a few ranges per thread, taken one by
// one, because cores are seldom equally free. A caller that finds the pool busy (another Python thread, or a kernel
// inside a kernel) does its work alone. The caller waits only for threads that have begun a range: one that the
// system has not woken yet costs nothing.
//
// A forked child has no threads but its own, and a mutex may have been held at the fork: the child forgets the old
// pool and makes a new one on first use.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#include "cpu/kernels.h"

namespace tlk {

class Pool {
  public:
    // The pool of this process. Never destroyed: threads must not be joined while the interpreter shuts down.
    static Pool& get() {
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(nullptr, nullptr, [] { current_.store(nullptr); });
        (void)registered;
#endif
        Pool* pool = current_.load();
        if (pool != nullptr) return *pool;
        Pool* fresh = new Pool;
        if (current_.compare_exchange_strong(pool, fresh)) return *fresh;
        delete fresh;
        return *pool;
    }

    // Threads a call may use, the caller's own included. TLKERNELS_NUM_THREADS, or the cores this process may run on.
    static int num_threads() {
        if (int n = num_threads_.load(); n > 0) return n;
        int unset = 0;
        num_threads_.compare_exchange_strong(unset, default_num_threads());
        return num_threads_.load();
    }

    // Holds from the next call on.
    static void set_num_threads(int n) { num_threads_.store(n); }

    // As Parallel::run. An exception of `body` is kept in `error`: it may unwind neither a kernel nor a thread.
    void run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx, std::exception_ptr& error) {
        if (n <= 0) return;
        const int threads = num_threads();
        const int64_t ranges = std::min<int64_t>(n / std::max<int64_t>(grain, 1), int64_t{kRangesPerThread} * threads);
        Job job{body, ctx, n, n, error};
        if (threads == 1 || ranges < 2 || busy_.test_and_set(std::memory_order_acquire)) {
            job.work();
            return;
        }
        job.step = (n + ranges - 1) / ranges;
        resize(threads - 1);
        {
            const std::lock_guard lock(mutex_);
            job_ = &job;
            ++epoch_;
        }
        wake_.notify_all();
        job.work();
        {
            std::unique_lock lock(mutex_);
            job_ = nullptr;
            done_.wait(lock, [this] { return inside_ == 0; });
        }
        busy_.clear(std::memory_order_release);
    }

  private:
    static constexpr int kRangesPerThread = 4;

    struct Job {
        void (*body)(void*, int64_t, int64_t);
        void* ctx;
        int64_t n, step;
        std::exception_ptr& error;
        std::atomic<int64_t> next{0};
        std::mutex error_mutex{};

        void work() noexcept {
            for (;;) {
                const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
                if (begin >= n) return;
                try {
                    body(ctx, begin, begin + std::min(step, n - begin));
                } catch (...) {
                    const std::lock_guard lock(error_mutex);
                    if (!error) error = std::current_exception();
                }
            }
        }
    };

    Pool() = default;

    ~Pool() { resize(0); }

    // Only the caller that holds `busy_` (or the destructor) comes here, so no thread is at work.
    void resize(int count) {
        if (count == wanted_) return;
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
        stop_ = false;
        wanted_ = count;
        const SignalsBlocked blocked;
        try {
            while (static_cast<int>(threads_.size()) < count) threads_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those there are, with the caller, do the work.
        }
    }

    void serve() {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || (job_ != nullptr && epoch_ != seen); });
            if (stop_) return;
            seen = epoch_;
            Job* job = job_;
            ++inside_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--inside_ == 0) done_.notify_one();
        }
    }

    // Threads inherit the mask they are born with. A signal must reach Python's own threads, whose system calls it
    // interrupts.
    class SignalsBlocked {
#if defined(__unix__) || defined(__APPLE__)
      public:
        SignalsBlocked() {
            sigset_t all;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before_);
        }
        ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
        SignalsBlocked(const SignalsBlocked&) = delete;
        SignalsBlocked& operator=(const SignalsBlocked&) = delete;

      private:
        sigset_t before_;
#endif
    };

    static int default_num_threads() {
        if (const char* text = std::getenv("TLKERNELS_NUM_THREADS"); text != nullptr && *text != '\0') {
            char* end = nullptr;
            const long n = std::strtol(text, &end, 10);
            if (*end != '\0' || n < 1 || n > kMaxThreads) {
                throw std::invalid_argument(std::string("TLKERNELS_NUM_THREADS is '") + text +
                                            "'; expected an integer from 1 to " + std::to_string(kMaxThreads));
            }
            return static_cast<int>(n);
        }
#if defined(__linux__)
        cpu_set_t usable;
        if (sched_getaffinity(0, sizeof usable, &usable) == 0) return std::min(CPU_COUNT(&usable), kMaxThreads);
#endif
        return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
    }

  public:
    static constexpr int kMaxThreads = 1024;

  private:
    static inline std::atomic<Pool*> current_{nullptr};
    static inline std::atomic<int> num_threads_{0};

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::vector<std::thread> threads_;
    int wanted_ = 0;

    std::mutex mutex_;  // guards what follows
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    uint64_t epoch_ = 0;
    int inside_ = 0;
    bool stop_ = false;
};

// What the Parallel of one kernel call points to.
class Call {
  public:
    Parallel parallel() { return {&Call::run, this}; }

    // After the kernel has returned: throws what its body threw.
    void finish() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    static void run(void* self, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
        Pool::get().run(n, grain, body, ctx, static_cast<Call*>(self)->error_);
    }

    std::exception_ptr error_;
};

}  // namespace tlk
