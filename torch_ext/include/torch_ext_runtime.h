/// torch_ext's encoders for programs that are not Python: a C interface of libtorch_ext_runtime.so, which needs nothing but
/// the C and C++ runtime libraries.
///
///   txr_encoder* encoder;
///   txr_error error = {.struct_size = sizeof error};
///   if (txr_open("encoder_bf16.safetensors", NULL, &encoder, &error) != TXR_OK) puts(error.message);
///
/// Every function may be called from several threads at once, with the same encoder, too. No exception leaves the library.
/// Structures begin with their size, which the caller sets to `sizeof`: a library that knows more fields takes 0 for those
/// that the caller's header lacks, so that programs run with later libraries. Strings are UTF-8 and end in 0.
#ifndef TORCH_EXT_RUNTIME_H
#define TORCH_EXT_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define TXR_API __attribute__((visibility("default")))
#else
#define TXR_API
#endif

#define TXR_ABI_VERSION 1

typedef enum txr_status {
  TXR_OK = 0,
  TXR_ERROR_VALUE = 1,     /* an argument, or what a file holds, is wrong */
  TXR_ERROR_TYPE = 2,      /* an argument has the wrong element type */
  TXR_ERROR_NOT_FOUND = 3, /* there is no such file */
  TXR_ERROR_SYSTEM = 4,    /* the operating system refused */
  TXR_ERROR_MEMORY = 5,    /* there is not enough memory */
  TXR_ERROR_INTERNAL = 6   /* anything else */
} txr_status;

/* What went wrong, in words. Functions take NULL where nobody wants to know. */
typedef struct txr_error {
  size_t struct_size;
  char message[1024];
} txr_error;

typedef struct txr_encoder txr_encoder; /* a model that is ready to run */
typedef struct txr_states txr_states;   /* the hidden states of one batch */
typedef struct txr_sparse txr_sparse;   /* sparse vectors of its texts */

typedef struct txr_options {
  size_t struct_size;
  const char* dtype;   /* "bf16", "fp32", "int8"; NULL: as the file was saved */
  size_t threads;      /* 0: as many as the affinity and the CPU quota of the process allow */
  const int32_t* cpus; /* [cpu_count], that the threads may run on; NULL: those of the process */
  size_t cpu_count;
  int32_t pin;    /* not 0: each thread on one of the CPUs */
  int32_t shared; /* not 0: weights in memory that other processes can map, see txr_share */
} txr_options;

typedef enum txr_element_type { TXR_FP32 = 0, TXR_FP16 = 1, TXR_BF16 = 2, TXR_INT8 = 3 } txr_element_type;

/* A weight, or a part of one: parts of the same name lie one after the other along the first dimension. */
typedef struct txr_tensor {
  size_t struct_size;
  const char* name; /* as files of torch_ext.Encoder name it */
  int32_t type;     /* txr_element_type */
  int32_t dimensions;
  const uint64_t* shape; /* [dimensions] */
  const void* data;      /* row after row */
  /* Not 0: `data` is of a file, mapped with MAP_SHARED and PROT_READ. Its pages leave memory as soon as they are packed. */
  int32_t mapped;
} txr_tensor;

typedef struct txr_model {
  size_t struct_size;
  const char* name;         /* for messages; NULL: "the model" */
  const char* encoder_json; /* the fields of torch_ext.EncoderSpec */
  const char* head_json;    /* those of torch_ext.HeadSpec; NULL: no head */
  const txr_tensor* tensors;
  size_t tensor_count;
} txr_model;

/* Rows of a table, normed and led through a linear layer: what a model's weights determine once. */
typedef struct txr_projection {
  size_t struct_size;
  const txr_tensor* table;       /* [rows, k] */
  const txr_tensor* norm_weight; /* [k] of a layer norm; NULL: none */
  const txr_tensor* norm_bias;   /* [k] */
  double eps;                    /* added to variances */
  const txr_tensor* weight;      /* [n, k] */
  const txr_tensor* bias;        /* [n]; NULL: none */
  const txr_tensor* residual;    /* [rows, n], added; NULL: none */
} txr_projection;

typedef struct txr_info {
  size_t struct_size;
  /* They live as long as the encoder. */
  const char* architecture;
  const char* dtype;
  const char* task; /* NULL: no head */
  const char* isa;  /* instruction set that the kernels are for */
  const char* encoder_json;
  const char* head_json; /* NULL: no head */
  int64_t hidden_size, num_layers, max_positions, vocab_size, type_vocab_size;
  int64_t outputs; /* of the head; 0: no head */
  size_t threads;
  size_t image_bytes;     /* memory of weights and tables */
  int64_t embedding_size; /* width of what txr_pool writes: hidden_size, or outputs of a head for feature-extraction */
} txr_info;

typedef struct txr_batch {
  size_t struct_size;
  const int64_t* ids; /* [tokens], all texts one after the other, special tokens included */
  size_t tokens;
  const int32_t* cu_seqlens; /* [texts + 1]: where each text begins, and the end; from 0 to tokens, rising */
  size_t texts;
  const int64_t* type_ids; /* [tokens]; NULL: type 0 everywhere */
  /* [texts]: of each text the first tokens that others attend to, from 1 to all of them, such as those of a ColBERT's query
     without the tokens that fill it up; NULL: all */
  const int32_t* attended;
} txr_batch;

typedef struct txr_pooling {
  size_t struct_size;
  /* "mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"; of several, "cls+mean", the vectors stand
     side by side: embedding_size for each, unless a head comes after them */
  const char* mode;
  int32_t normalize; /* not 0: to length 1 */
  size_t dimensions; /* leading dimensions to keep; 0: all */
  size_t skipped;    /* leading tokens of each text that do not count, such as those of a prompt */
} txr_pooling;

/* How a head's outputs for the tokens of a text become one sparse vector, as in SPLADE: log(1 + max(x, 0)) of each, and the
   largest over the tokens. */
typedef struct txr_sparse_pooling {
  size_t struct_size;
  int32_t sum;   /* not 0: the sum over the tokens */
  int32_t twice; /* not 0: log(1 + x) of that again */
} txr_sparse_pooling;

/* Vectors over the head's outputs: text i has the entries from bounds[i] to bounds[i + 1], by rising index. */
typedef struct txr_sparse_view {
  size_t struct_size;
  size_t texts;
  size_t entries;
  const int64_t* bounds;  /* [texts + 1] */
  const int64_t* indices; /* [entries] */
  const float* values;    /* [entries], not 0; NaN or infinite where a logit is */
} txr_sparse_view;

/* TXR_ABI_VERSION of the library: compare it with that of the header. */
TXR_API uint32_t txr_abi_version(void);

/* JSON: architecture, instruction set, kernels, CPU features. NULL if TORCH_EXT_ISA names none. Lives for ever. */
TXR_API const char* txr_isa_report(void);

/* Threads that an encoder gets that asks for none. */
TXR_API size_t txr_default_threads(void);

/* Reads a file written by torch_ext.Encoder.save() or by `python -m deploy export`, and packs it for this CPU. */
TXR_API txr_status txr_open(const char* path, const txr_options* options, txr_encoder** encoder, txr_error* error);

/* Packs weights that are in memory; they are not needed afterwards. */
TXR_API txr_status txr_pack(const txr_model* model, const txr_options* options, txr_encoder** encoder,
                            txr_error* error);

/* Writes fp32 [rows, n] to `out`, which has room for `count` elements. Runs on the caller's thread. */
TXR_API txr_status txr_project_rows(const txr_projection* projection, float* out, size_t count, txr_error* error);

/* Maps what txr_save_image wrote or txr_share gave, read-only. `dtype` and `shared` of the options mean nothing here. */
TXR_API txr_status txr_open_image(const char* path, const txr_options* options, txr_encoder** encoder,
                                  txr_error* error);
TXR_API txr_status txr_open_image_fd(int fd, const txr_options* options, txr_encoder** encoder, txr_error* error);

/* Writes the packed model as a file for other processes on machines of this kind. */
TXR_API txr_status txr_save_image(const txr_encoder* encoder, const char* path, txr_error* error);

/* A descriptor, for the caller to close, of a sealed memory file that holds the packed model. */
TXR_API txr_status txr_share(const txr_encoder* encoder, int* fd, txr_error* error);

TXR_API txr_status txr_describe(const txr_encoder* encoder, txr_info* info, txr_error* error);

/* Runs a batch. */
TXR_API txr_status txr_encode(const txr_encoder* encoder, const txr_batch* batch, txr_states** states,
                              txr_error* error);

/* Frees the memory that the encoder's threads, and the caller's, keep for the next batch: some MB, more after large
   batches. The caller is to be the thread that calls txr_encode. The next batch takes what it needs again. */
TXR_API txr_status txr_release_workspace(const txr_encoder* encoder, txr_error* error);

/* What follows writes to `out`, which has room for `count` elements, and fails unless that is exactly what is written. */

/* The last hidden states, fp32 [tokens, hidden_size]. */
TXR_API txr_status txr_hidden(const txr_states* states, float* out, size_t count, txr_error* error);
/* A vector for each text, fp32 [texts, dimensions]; after a head for feature-extraction, if there is one. */
TXR_API txr_status txr_pool(const txr_states* states, const txr_pooling* pooling, float* out, size_t count,
                            txr_error* error);
/* A vector for each token, fp32 [tokens, embedding_size]; after a head for feature-extraction, if there is one. normalize not
   0: to length 1. */
TXR_API txr_status txr_token_vectors(const txr_states* states, int32_t normalize, float* out, size_t count,
                                     txr_error* error);
/* What a head for text classification says of each text, fp32 [texts, outputs]. */
TXR_API txr_status txr_text_logits(const txr_states* states, float* out, size_t count, txr_error* error);
/* What a head for tokens says of some of them, fp32 [row_count, outputs]: of the batch's tokens rows [row_count]; NULL: of
   all. Labels of tokens, the start and the end of an answer, or words for a mask. */
TXR_API txr_status txr_token_logits(const txr_states* states, const int64_t* rows, size_t row_count, float* out,
                                    size_t count, txr_error* error);
/* The k likeliest outputs for some tokens, likeliest first: their indices and probabilities, each [row_count, k]. */
TXR_API txr_status txr_top_k(const txr_states* states, const int64_t* rows, size_t row_count, size_t k,
                             int64_t* indices, float* probabilities, txr_error* error);

/* A sparse vector over the head's outputs for each text; NULL for a pooling: the largest. Views live as long as `sparse`. */
TXR_API txr_status txr_sparse_pool(const txr_states* states, const txr_sparse_pooling* pooling, txr_sparse** sparse,
                                   txr_error* error);
TXR_API txr_status txr_view_sparse(const txr_sparse* sparse, txr_sparse_view* view, txr_error* error);
TXR_API void txr_free_sparse(txr_sparse* sparse);

/* Frees; NULL is fine. States may outlive their encoder. */
TXR_API void txr_free_states(txr_states* states);
TXR_API void txr_close(txr_encoder* encoder);

#ifdef __cplusplus
}
#endif

#endif /* TORCH_EXT_RUNTIME_H */
