/// What a Tokenizer holds; shared by its reader and its encoder.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/text/added_tokens.h"
#include "engine/text/bpe.h"
#include "engine/text/pre_tokenizer.h"
#include "engine/text/tokenizer.h"
#include "engine/text/vocabulary.h"

namespace compact::engine {

struct Tokenizer::Impl {
  Vocabulary vocabulary;
  std::optional<Bpe> bpe;                     // always set once read
  std::optional<PreTokenizer> pre_tokenizer;  // always set once read
  bool normalize_nfc = false;

  std::unordered_map<int32_t, AddedToken> added_by_id;
  std::unordered_map<std::string, int32_t> added_by_content;
  AddedTokenFinder added_before_normalizer;
  AddedTokenFinder added_after_normalizer;  // holds no special token if normalize_nfc: positions would be lost
  int32_t vocab_size = 0;

  std::vector<int32_t> prefix_ids;  // the template of the post-processor, before the text
  std::vector<int32_t> suffix_ids;  // and behind it
};

}  // namespace compact::engine
