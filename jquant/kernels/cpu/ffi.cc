// The product as XLA calls it, on XLA's own threads.
#include <atomic>
#include <functional>
#include <memory>

#include "attention.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Bytes that are worth waking another thread for: one core reads them in the time that it takes, some 20 µs.
constexpr int64_t GRAIN = 1 << 20;

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

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> data,
                   ffi::Span<const float> levels, int64_t width, int64_t group, int64_t scale, int64_t offset,
                   int64_t centre, int64_t block, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_shape = x.dimensions(), y_shape = y->dimensions();
  const int64_t rows = x_shape[0];
  const jquant::Weight w{reinterpret_cast<const uint8_t*>(data.typed_data()),
                         levels.begin(),
                         x_shape[1],
                         y_shape[1],
                         group,
                         static_cast<int32_t>(centre),
                         static_cast<int>(scale),
                         static_cast<int>(offset)};
  const int64_t work = static_cast<int64_t>(data.size_bytes()) * std::min<int64_t>(rows, 16);
  const auto each = [&](int64_t tasks, const std::function<void(int64_t)>& f) {
    const int64_t helpers = std::min({pool.num_threads() - 1, tasks - 1, work / GRAIN});
    run(pool, tasks, std::max<int64_t>(helpers, 0), f);
  };
  jquant::product(width, w, x.typed_data(), rows, block, y->typed_data(), each);
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::S32> length, ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = k.dimensions();
  const int64_t texts = shape[0], heads = shape[1], slots = shape[2], d = shape[3];
  const int64_t group = q.dimensions()[1] / heads, filled = std::min<int64_t>(*length.typed_data(), slots);
  const int64_t helpers = std::min({pool.num_threads() - 1, texts * heads - 1, texts * heads * filled * d * 8 / GRAIN});
  run(pool, texts * heads, std::max<int64_t>(helpers, 0), [&](int64_t n) {
    jquant::attend(q.typed_data() + n * group * d, k.typed_data() + n * slots * d, v.typed_data() + n * slots * d, filled,
                   group, d, y->typed_data() + n * group * d);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JquantAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()    // q [texts, heads · group, 1, d]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // k [texts, heads, slots, d]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // v likewise
                                  .Arg<ffi::Buffer<ffi::S32>>()    // length []
                                  .Ret<ffi::Buffer<ffi::F32>>());  // like q

XLA_FFI_DEFINE_HANDLER_SYMBOL(JquantProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x [rows, in]
                                  .Arg<ffi::Buffer<ffi::U32>>()  // data
                                  .Attr<ffi::Span<const float>>("levels")  // [16]
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("scale")
                                  .Attr<int64_t>("offset")
                                  .Attr<int64_t>("centre")
                                  .Attr<int64_t>("block")
                                  .Ret<ffi::Buffer<ffi::F32>>());  // y [rows, out]
