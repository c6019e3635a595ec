/* Embeds the texts of a file: one text a line, as token ids with spaces between them. Prints one vector a line.
 *
 *   cc -std=c99 examples/embed.c -I"$DIR/include" -L"$DIR" -ltorch_ext_runtime -Wl,-rpath,"$DIR" -o embed
 *   ./embed encoder_bf16.safetensors ids.txt
 *
 * DIR is the folder of the torch_ext package; see docs/runtime.md. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "torch_ext_runtime.h"

static txr_error error = {.struct_size = sizeof(txr_error)};

static void check(int ok, const char* message) {
  if (ok) return;
  fprintf(stderr, "embed: %s\n", message);
  exit(1);
}

int main(int argc, char** argv) {
  check(argc == 3, "usage: embed ENCODER IDS");
  FILE* file = fopen(argv[2], "r");
  check(file != NULL, "cannot open the file of ids");
  size_t tokens = 0, texts = 0;
  int64_t* ids = NULL;
  int32_t* starts = calloc(1, sizeof *starts);
  for (int c; (c = fgetc(file)) != EOF;) {
    if (c == '\n') {
      starts = realloc(starts, (++texts + 1) * sizeof *starts);
      starts[texts] = (int32_t)tokens;
    } else if (c != ' ') {
      ungetc(c, file);
      ids = realloc(ids, (tokens + 1) * sizeof *ids);
      check(fscanf(file, "%" SCNd64, &ids[tokens++]) == 1, "expected token ids, spaces and line breaks");
    }
  }
  fclose(file);

  txr_encoder* encoder;
  txr_states* states;
  check(txr_open(argv[1], NULL, &encoder, &error) == TXR_OK, error.message);
  txr_info info = {.struct_size = sizeof info};
  check(txr_describe(encoder, &info, &error) == TXR_OK, error.message);
  txr_batch batch = {.struct_size = sizeof batch, .ids = ids, .tokens = tokens, .cu_seqlens = starts, .texts = texts};
  check(txr_encode(encoder, &batch, &states, &error) == TXR_OK, error.message);

  size_t width = (size_t)info.hidden_size;
  float* vectors = malloc(texts * width * sizeof *vectors);
  txr_pooling pooling = {.struct_size = sizeof pooling, .mode = "mean", .normalize = 1};
  check(txr_pool(states, &pooling, vectors, texts * width, &error) == TXR_OK, error.message);
  for (size_t i = 0; i < texts * width; ++i) printf("%.9g%c", (double)vectors[i], (i + 1) % width ? ' ' : '\n');

  free(vectors), free(starts), free(ids);
  txr_free_states(states);
  txr_close(encoder);
  return 0;
}
