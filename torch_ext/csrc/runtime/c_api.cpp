// The C interface of include/torch_ext_runtime.h: exceptions become a status and a message.
#include <algorithm>
#include <cstring>
#include <new>
#include <system_error>

#include "../include/torch_ext_runtime.h"
#include "projection.h"
#include "runtime/elements.h"
#include "runtime/engine.h"
#include "runtime/error.h"

using namespace torch_ext::runtime;  // NOLINT: this file is nothing but the runtime's outside

struct txr_encoder {
  std::shared_ptr<const Engine> engine;
};

struct txr_states {
  std::unique_ptr<States> states;
};

struct txr_sparse {
  SparseVectors vectors;
};

namespace {

// The caller's structure, with 0 for fields that it does not know.
template <typename T>
T completed(const T* given, const char* name) {
  T whole = {};
  if (!given) return whole;
  expect(given->struct_size >= sizeof(size_t) && given->struct_size <= 4096, name, ": struct_size is ",
         given->struct_size, ", expected sizeof(", name, ")");
  std::memcpy(&whole, given, std::min(given->struct_size, sizeof whole));
  return whole;
}

txr_status describe_error(txr_error* error, ErrorCode code, const char* message) {
  const size_t first = offsetof(txr_error, message);
  if (error && error->struct_size > first) {
    const size_t room = std::min(error->struct_size, sizeof *error) - first;
    size_t length = std::min(std::strlen(message), room - 1);
    // Not in the middle of a character of UTF-8.
    while (length > 0 && (message[length] & 0xc0) == 0x80) --length;
    std::memcpy(error->message, message, length);
    error->message[length] = '\0';
  }
  return static_cast<txr_status>(code);
}

template <typename F>
txr_status guarded(txr_error* error, const F& fn) {
  try {
    fn();
    return TXR_OK;
  } catch (const Error& e) {
    return describe_error(error, e.code(), e.what());
  } catch (const std::bad_alloc&) {
    return describe_error(error, ErrorCode::kMemory, "not enough memory");
  } catch (const std::system_error& e) {
    return describe_error(error, ErrorCode::kSystem, e.what());
  } catch (const std::runtime_error& e) {
    return describe_error(error, ErrorCode::kValue, e.what());
  } catch (const std::exception& e) {
    return describe_error(error, ErrorCode::kInternal, e.what());
  } catch (...) {
    return describe_error(error, ErrorCode::kInternal, "unknown error");
  }
}

Options read_options(const txr_options* given) {
  const txr_options o = completed(given, "txr_options");
  expect(o.cpus || o.cpu_count == 0, "txr_options: cpu_count is ", o.cpu_count, " without cpus");
  return {.dtype = o.dtype ? o.dtype : "",
          .threads = o.threads,
          .cpus = o.cpus ? std::vector<int>(o.cpus, o.cpus + o.cpu_count) : std::vector<int>(),
          .pin = o.pin != 0,
          .shared = o.shared != 0};
}

template <typename Open>
txr_status open_encoder(txr_encoder** encoder, txr_error* error, const Open& open) {
  return guarded(error, [&] {
    expect(encoder, "expected a place for the encoder, got NULL");
    *encoder = nullptr;
    auto made = std::make_unique<txr_encoder>();
    made->engine = open();
    *encoder = made.release();
  });
}

TensorView read_tensor(const txr_tensor& given) {
  const txr_tensor t = completed(&given, "txr_tensor");
  expect(t.name && t.data && t.shape, "txr_tensor: expected a name, a shape and data, got NULL");
  expect(t.dimensions == 1 || t.dimensions == 2, "txr_tensor ", t.name, ": expected 1 or 2 dimensions, got ",
         t.dimensions);
  expect(t.type >= TXR_FP32 && t.type <= TXR_INT8, "txr_tensor ", t.name, ": unknown type ", t.type);
  TensorView view{.type = static_cast<ElementType>(t.type),
                  .shape = {t.shape, t.shape + t.dimensions},
                  .data = static_cast<const char*>(t.data),
                  .mapped = t.mapped != 0};
  for (const uint64_t n : view.shape) {
    expect(n > 0 && n < uint64_t{1} << 31, "txr_tensor ", t.name, ": expected sizes of at least 1, got ", n);
  }
  return view;
}

const Engine& engine_of(const txr_encoder* encoder) {
  expect(encoder, "expected an encoder, got NULL");
  return *encoder->engine;
}

const States& states_of(const txr_states* states) {
  expect(states, "expected states, got NULL");
  return *states->states;
}

void expect_room(const void* out, size_t count, size_t rows, size_t columns) {
  expect(out || count == 0, "expected a place for the result, got NULL");
  expect(count == rows * columns, "expected room for ", rows, " x ", columns, " elements, got ", count);
}

}  // namespace

uint32_t txr_abi_version(void) { return TXR_ABI_VERSION; }

const char* txr_isa_report(void) {
  static const std::string report = [] {
    try {
      torch_ext::own_dispatch();
      return torch_ext::isa_report_json();
    } catch (const std::exception&) {
      return std::string();
    }
  }();
  return report.empty() ? nullptr : report.c_str();
}

size_t txr_default_threads(void) { return torch_ext::default_threads(); }

txr_status txr_open(const char* path, const txr_options* options, txr_encoder** encoder, txr_error* error) {
  return open_encoder(encoder, error, [&] {
    expect(path, "txr_open: expected a path, got NULL");
    return Engine::open(path, read_options(options));
  });
}

txr_status txr_pack(const txr_model* model, const txr_options* options, txr_encoder** encoder, txr_error* error) {
  return open_encoder(encoder, error, [&] {
    const txr_model m = completed(model, "txr_model");
    const Options read = read_options(options);
    expect(m.encoder_json && m.tensors, "txr_model: expected encoder_json and tensors, got NULL");
    const std::string name = m.name ? m.name : "the model";
    const Specs specs =
        parse_specs(name, m.encoder_json, m.head_json ? m.head_json : "", read.dtype.empty() ? "bf16" : read.dtype);
    Weights weights;
    const char* at = reinterpret_cast<const char*>(m.tensors);
    for (size_t i = 0; i < m.tensor_count; ++i) {
      const auto& tensor = *reinterpret_cast<const txr_tensor*>(at);
      expect(tensor.struct_size % alignof(txr_tensor) == 0, "txr_tensor: struct_size is ", tensor.struct_size,
             ", expected sizeof(txr_tensor)");
      const TensorView view = read_tensor(tensor);
      weights[tensor.name].push_back(view);
      at += tensor.struct_size;
    }
    return Engine::from_weights(name, specs, weights, read);
  });
}

txr_status txr_project_rows(const txr_projection* projection, float* out, size_t count, txr_error* error) {
  return guarded(error, [&] {
    const txr_projection p = completed(projection, "txr_projection");
    expect(p.table && p.weight && !p.norm_weight == !p.norm_bias,
           "txr_projection: expected a table and a weight, and the weight and bias of a norm or neither");
    // `shape` has 0 for any size.
    const auto floats = [](const txr_tensor* given, const std::vector<uint64_t>& shape) {
      if (!given) return std::vector<float>();
      const TensorView view = read_tensor(*given);
      bool fits = view.shape.size() == shape.size();
      for (size_t i = 0; fits && i < shape.size(); ++i) fits = !shape[i] || view.shape[i] == shape[i];
      expect(fits, "txr_projection: expected ", given->name, " ", describe(shape), ", got ", describe(view));
      return floats_of(view);
    };
    const std::vector<float> table = floats(p.table, {0, 0}), weight = floats(p.weight, {0, p.table->shape[1]});
    const uint64_t rows = p.table->shape[0], k = p.table->shape[1], n = p.weight->shape[0];
    const std::vector<float> norm_weight = floats(p.norm_weight, {k}), norm_bias = floats(p.norm_bias, {k});
    const std::vector<float> bias = floats(p.bias, {n});
    const std::vector<float> residual = floats(p.residual, {rows, n});
    expect_room(out, count, static_cast<size_t>(rows), static_cast<size_t>(n));
    const torch_ext::Projection whole = {.rows = static_cast<size_t>(rows),
                                         .k = static_cast<size_t>(k),
                                         .n = static_cast<size_t>(n),
                                         .table = table.data(),
                                         .norm_weight = p.norm_weight ? norm_weight.data() : nullptr,
                                         .norm_bias = p.norm_bias ? norm_bias.data() : nullptr,
                                         .eps = static_cast<float>(p.eps),
                                         .weight = weight.data(),
                                         .bias = p.bias ? bias.data() : nullptr,
                                         .residual = p.residual ? residual.data() : nullptr};
    torch_ext::project_rows(torch_ext::dispatch(), whole, out);
  });
}

txr_status txr_open_image(const char* path, const txr_options* options, txr_encoder** encoder, txr_error* error) {
  return open_encoder(encoder, error, [&] {
    expect(path, "txr_open_image: expected a path, got NULL");
    return Engine::from_image(std::string(path), read_options(options));
  });
}

txr_status txr_open_image_fd(int fd, const txr_options* options, txr_encoder** encoder, txr_error* error) {
  return open_encoder(encoder, error,
                      [&] { return Engine::from_image(fd, "the shared image", read_options(options)); });
}

txr_status txr_save_image(const txr_encoder* encoder, const char* path, txr_error* error) {
  return guarded(error, [&] {
    expect(path, "txr_save_image: expected a path, got NULL");
    engine_of(encoder).image().save(path);
  });
}

txr_status txr_share(const txr_encoder* encoder, int* fd, txr_error* error) {
  return guarded(error, [&] {
    expect(fd, "txr_share: expected a place for the descriptor, got NULL");
    *fd = engine_of(encoder).image().share();
  });
}

txr_status txr_release_workspace(const txr_encoder* encoder, txr_error* error) {
  return guarded(error, [&] { engine_of(encoder).release_workspace(); });
}

txr_status txr_describe(const txr_encoder* encoder, txr_info* info, txr_error* error) {
  return guarded(error, [&] {
    expect(info && info->struct_size >= sizeof(size_t), "txr_describe: expected a txr_info with its struct_size");
    const Engine& engine = engine_of(encoder);
    const Image& image = engine.image();
    const Specs& specs = image.specs();
    txr_info all = {};
    all.struct_size = info->struct_size;
    all.architecture = specs.encoder.architecture.c_str();
    all.dtype = specs.dtype.c_str();
    all.task = specs.head ? specs.head->task.c_str() : nullptr;
    all.isa = engine.dispatch().isa->name;
    all.encoder_json = specs.encoder_json.c_str();
    all.head_json = specs.head ? specs.head_json.c_str() : nullptr;
    all.hidden_size = specs.encoder.hidden_size;
    all.num_layers = specs.encoder.num_layers;
    all.max_positions = specs.encoder.max_positions;
    all.vocab_size = specs.encoder.vocab_size;
    all.type_vocab_size = specs.encoder.type_vocab_size;
    all.outputs = specs.head ? specs.head->num_outputs : 0;
    all.threads = engine.threads();
    all.image_bytes = image.bytes();
    const bool projects = specs.head && specs.head->task == "feature-extraction";
    all.embedding_size = projects ? all.outputs : all.hidden_size;
    std::memcpy(info, &all, std::min(info->struct_size, sizeof all));
  });
}

txr_status txr_encode(const txr_encoder* encoder, const txr_batch* batch, txr_states** states, txr_error* error) {
  return guarded(error, [&] {
    expect(states, "txr_encode: expected a place for the states, got NULL");
    *states = nullptr;
    const Engine& engine = engine_of(encoder);
    const txr_batch b = completed(batch, "txr_batch");
    expect(b.cu_seqlens && (b.ids || b.tokens == 0), "txr_batch: expected ids and cu_seqlens, got NULL");
    auto made = std::make_unique<txr_states>();
    made->states = engine.encode({.ids = b.ids,
                                  .type_ids = b.type_ids,
                                  .cu_seqlens = b.cu_seqlens,
                                  .attended = b.attended,
                                  .sequences = b.texts,
                                  .tokens = b.tokens});
    *states = made.release();
  });
}

txr_status txr_hidden(const txr_states* states, float* out, size_t count, txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    expect_room(out, count, s.tokens(), static_cast<size_t>(s.engine().image().specs().encoder.hidden_size));
    s.copy_hidden(out);
  });
}

txr_status txr_pool(const txr_states* states, const txr_pooling* pooling, float* out, size_t count, txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    const txr_pooling p = completed(pooling, "txr_pooling");
    const std::string mode = p.mode ? p.mode : "mean";
    const TextPooling wanted{.modes = torch_ext::find_poolings(mode),
                             .normalize = p.normalize != 0,
                             .dimensions = p.dimensions,
                             .skipped = p.skipped};
    expect(!wanted.modes.empty(), "expected a pooling of ", torch_ext::pooling_names(),
           ", or several joined by +; got '", mode, "'");
    const size_t width = s.embedding_size(wanted.modes.size());
    expect(p.dimensions <= width, "expected dimensions of at most ", width, ", got ", p.dimensions);
    expect_room(out, count, s.texts(), p.dimensions ? p.dimensions : width);
    s.pool(wanted, out);
  });
}

txr_status txr_token_vectors(const txr_states* states, int32_t normalize, float* out, size_t count, txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    expect_room(out, count, s.tokens(), s.embedding_size());
    s.token_vectors(normalize != 0, out);
  });
}

txr_status txr_text_logits(const txr_states* states, float* out, size_t count, txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    expect_room(out, count, s.texts(), s.outputs());
    s.text_logits(out);
  });
}

txr_status txr_token_logits(const txr_states* states, const int64_t* rows, size_t row_count, float* out, size_t count,
                            txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    const size_t wanted = rows ? row_count : s.tokens();
    expect_room(out, count, wanted, s.outputs());
    s.token_logits(rows, wanted, out);
  });
}

txr_status txr_top_k(const txr_states* states, const int64_t* rows, size_t row_count, size_t k, int64_t* indices,
                     float* probabilities, txr_error* error) {
  return guarded(error, [&] {
    const States& s = states_of(states);
    expect((rows && indices && probabilities) || row_count == 0, "txr_top_k: expected rows and places, got NULL");
    s.top_k(rows, row_count, k, indices, probabilities);
  });
}

txr_status txr_sparse_pool(const txr_states* states, const txr_sparse_pooling* pooling, txr_sparse** sparse,
                           txr_error* error) {
  return guarded(error, [&] {
    expect(sparse, "txr_sparse_pool: expected a place for the vectors, got NULL");
    *sparse = nullptr;
    const txr_sparse_pooling p = completed(pooling, "txr_sparse_pooling");
    auto made = std::make_unique<txr_sparse>();
    made->vectors = states_of(states).sparse({.sum = p.sum != 0, .twice = p.twice != 0});
    *sparse = made.release();
  });
}

txr_status txr_view_sparse(const txr_sparse* sparse, txr_sparse_view* view, txr_error* error) {
  return guarded(error, [&] {
    expect(sparse, "expected sparse vectors, got NULL");
    expect(view && view->struct_size >= sizeof(size_t),
           "txr_view_sparse: expected a txr_sparse_view with its struct_size");
    const SparseVectors& v = sparse->vectors;
    const txr_sparse_view all = {.struct_size = view->struct_size,
                                 .texts = v.bounds.size() - 1,
                                 .entries = v.indices.size(),
                                 .bounds = v.bounds.data(),
                                 .indices = v.indices.data(),
                                 .values = v.values.data()};
    std::memcpy(view, &all, std::min(view->struct_size, sizeof all));
  });
}

void txr_free_sparse(txr_sparse* sparse) { delete sparse; }
void txr_free_states(txr_states* states) { delete states; }
void txr_close(txr_encoder* encoder) { delete encoder; }
