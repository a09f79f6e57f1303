// Threads that share the tasks of one call from Python, and end together.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace els {

// Runs `body(cancelled)` on a number of threads, at most one for each task, or on as many as can be
// started; Ctrl-C and the first exception end all of them. Ten times a second `watch` is called,
// which may call Python.
template <typename Body, typename Watch>
void on_threads(std::int64_t threads, std::int64_t tasks, const Body& body, const Watch& watch) {
  threads = std::min(threads, std::max<std::int64_t>(tasks, 1));
  std::atomic<bool> cancelled{false};
  std::mutex mutex;
  std::condition_variable finished;
  int running = 0;
  std::exception_ptr failure;
  std::vector<std::thread> pool;
  const auto guarded = [&] {
    std::exception_ptr caught;
    try {
      body(cancelled);
    } catch (...) {
      caught = std::current_exception();
      cancelled = true;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (caught && !failure) failure = caught;
    --running;
    finished.notify_all();
  };
  {
    pybind11::gil_scoped_release release;
    pool.reserve(threads);
    try {
      for (std::int64_t i = 0; i < threads; ++i) {
        {
          const std::lock_guard<std::mutex> lock(mutex);
          ++running;
        }
        pool.emplace_back(guarded);
      }
    } catch (
        const std::exception&) {  // a limit on threads or memory: those that run compute all tasks
      const std::lock_guard<std::mutex> lock(mutex);
      --running;
    }
    std::unique_lock<std::mutex> lock(mutex);
    while (!finished.wait_for(lock, std::chrono::milliseconds(100), [&] { return running == 0; })) {
      lock.unlock();
      {
        pybind11::gil_scoped_acquire acquire;
        try {
          if (!cancelled) watch();
        } catch (pybind11::error_already_set& error) {
          error.restore();
          cancelled = true;
        }
        if (!cancelled && PyErr_CheckSignals() != 0) cancelled = true;
      }
      lock.lock();
    }
    lock.unlock();
    for (std::thread& thread : pool) thread.join();
  }
  if (pool.empty()) {
    throw std::runtime_error(
        "no thread can be started: raise the limit on processes or memory (ulimit -u, ulimit -v)");
  }
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if (failure) std::rethrow_exception(failure);
}

template <typename Body>
void on_threads(std::int64_t threads, std::int64_t tasks, const Body& body) {
  on_threads(threads, tasks, body, [] {});
}

}  // namespace els
