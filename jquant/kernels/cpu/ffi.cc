// The product as XLA calls it, on XLA's own threads.
#include <atomic>
#include <functional>
#include <memory>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Bytes of words that are worth waking another thread for.
constexpr int64_t GRAIN = 1 << 17;

// Runs f(0) … f(tasks − 1) on this thread and on idle ones of the pool. This thread takes tasks, too, and waits only for
// those that another thread has begun, so a busy pool costs time but never blocks.
void run(ffi::ThreadPool& pool, int64_t tasks, int64_t helpers, const std::function<void(int64_t)>& f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  const auto shared = std::make_shared<Shared>();
  // `f` lives until all tasks are done; a helper that comes later takes none and does not touch it.
  const auto work = [shared, tasks, &f] {
    for (int64_t task; (task = shared->next.fetch_add(1)) < tasks;) {
      f(task);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load(std::memory_order_acquire) < tasks) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words,
                   ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::F32> levels,
                   int64_t width, int64_t group, int64_t centre, int64_t block, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_shape = x.dimensions(), y_shape = y->dimensions();
  const int64_t rows = x_shape[0];
  const float* offsets = offset.element_count() ? offset.typed_data() : nullptr;
  const jquant::Weight w{words.typed_data(), scale.typed_data(), offsets,  levels.typed_data(),
                         x_shape[1],         y_shape[1],         group,    static_cast<int32_t>(centre)};
  const int64_t work = static_cast<int64_t>(words.element_count()) * 4 * (rows > 16 ? 16 : rows);
  const auto each = [&](int64_t tasks, const std::function<void(int64_t)>& f) {
    const int64_t helpers = std::min({pool.num_threads() - 1, tasks - 1, work / GRAIN});
    run(pool, tasks, std::max<int64_t>(helpers, 0), f);
  };
  jquant::product(width, w, x.typed_data(), rows, block, y->typed_data(), each);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JquantProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x [rows, in]
                                  .Arg<ffi::Buffer<ffi::U32>>()  // words
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scale
                                  .Arg<ffi::Buffer<ffi::F32>>()  // offset, or nothing
                                  .Arg<ffi::Buffer<ffi::F32>>()  // levels [16]
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("centre")
                                  .Attr<int64_t>("block")
                                  .Ret<ffi::Buffer<ffi::F32>>());  // y [rows, out]
