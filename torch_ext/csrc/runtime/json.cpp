#include "runtime/json.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <locale.h>
#include <unordered_set>
#include <utility>

#include "runtime/error.h"

namespace torch_ext::runtime {
namespace {

constexpr int kMaxDepth = 32;

// The number of a token that is one. strtod itself would take the decimal point of the program's locale.
double to_double(const std::string& token) {
  static const locale_t c = newlocale(LC_ALL_MASK, "C", nullptr);
  return strtod_l(token.c_str(), nullptr, c);
}

// Bytes of the UTF-8 character that `text` begins with; 0 if it is none.
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Spelled longer than need be, half of a surrogate pair, or beyond Unicode.
  const unsigned char second = byte(1);
  const bool wrong = (first == 0xe0 && second < 0xa0) || (first == 0xed && second >= 0xa0) ||
                     (first == 0xf0 && second < 0x90) || (first == 0xf4 && second >= 0x90);
  return wrong ? 0 : length;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) wrong("the end");
    return value;
  }

 private:
  [[noreturn]] void wrong(const char* expected) const {
    fail(ErrorCode::kValue, "JSON: expected ", expected, " at byte ", at_);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }

  bool take(char c) {
    skip_space();
    if (peek() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }

  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) wrong("less depth");
    skip_space();
    Json value;
    switch (peek()) {
      case '{':
        object(value, depth);
        break;
      case '[':
        array(value, depth);
        break;
      case '"':
        value.kind = Json::Kind::kString;
        value.string = string();
        break;
      default:
        if (take_word("null")) break;
        if (take_word("true")) {
          value.kind = Json::Kind::kBool;
          value.boolean = true;
        } else if (take_word("false")) {
          value.kind = Json::Kind::kBool;
        } else {
          number(value);
        }
    }
    return value;
  }

  void object(Json& value, int depth) {
    value.kind = Json::Kind::kObject;
    ++at_;
    if (take('}')) return;
    std::unordered_set<std::string> names;
    do {
      skip_space();
      if (peek() != '"') wrong("the name of a field");
      std::string name = string();
      if (!names.insert(name).second) wrong("each field once");
      if (!take(':')) wrong("':'");
      value.fields.push_back({std::move(name), parse(depth + 1)});
    } while (take(','));
    if (!take('}')) wrong("',' or '}'");
  }

  void array(Json& value, int depth) {
    value.kind = Json::Kind::kArray;
    ++at_;
    if (take(']')) return;
    do {
      value.items.push_back(parse(depth + 1));
    } while (take(','));
    if (!take(']')) wrong("',' or ']'");
  }

  void number(Json& value) {
    const size_t begin = at_;
    if (peek() == '-') ++at_;
    const auto digits = [&] {
      const size_t first = at_;
      while (peek() >= '0' && peek() <= '9') ++at_;
      return at_ - first;
    };
    const size_t whole = at_;
    const size_t length = digits();
    if (length == 0 || (length > 1 && text_[whole] == '0')) {
      at_ = begin;
      wrong("a value");
    }
    bool integer = true;
    if (peek() == '.') {
      integer = false;
      ++at_;
      if (digits() == 0) wrong("a digit");
    }
    if (peek() == 'e' || peek() == 'E') {
      integer = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (digits() == 0) wrong("a digit");
    }
    const std::string token(text_.substr(begin, at_ - begin));
    value.number = to_double(token);
    errno = 0;
    value.integer = integer ? std::strtoll(token.c_str(), nullptr, 10) : 0;
    value.kind = integer && errno == 0 ? Json::Kind::kInteger : Json::Kind::kNumber;
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const bool digit = c >= '0' && c <= '9', low = c >= 'a' && c <= 'f', high = c >= 'A' && c <= 'F';
      if (!digit && !low && !high) wrong("four hexadecimal digits");
      code = code * 16 + static_cast<uint32_t>(digit ? c - '0' : low ? c - 'a' + 10 : c - 'A' + 10);
    }
    return code;
  }

  static void append_utf8(std::string& s, uint32_t code) {
    const auto put = [&](uint32_t byte) { s += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xc0 | code >> 6);
    } else if (code < 0x10000) {
      put(0xe0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3f));
    } else {
      put(0xf0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3f));
      put(0x80 | (code >> 6 & 0x3f));
    }
    put(0x80 | (code & 0x3f));
  }

  std::string string() {
    std::string s;
    for (++at_;;) {
      if (at_ >= text_.size()) wrong("'\"'");
      const char c = text_[at_++];
      if (c == '"') return s;
      if (static_cast<unsigned char>(c) < 0x20) wrong("an escaped control character");
      if (c != '\\') {
        const size_t length = utf8_length(text_.substr(--at_));
        if (length == 0) wrong("UTF-8");
        s += text_.substr(at_, length);
        at_ += length;
        continue;
      }
      const char escape = peek();
      ++at_;
      static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
      if (const size_t which = kFrom.find(escape); which != std::string_view::npos) {
        s += kTo[which];
      } else if (escape == 'u') {
        uint32_t code = hex4();
        if (code >= 0xdc00 && code < 0xe000) wrong("the first half of a surrogate pair before the second");
        if (code >= 0xd800 && code < 0xdc00) {
          if (!take_word("\\u")) wrong("the second half of a surrogate pair");
          const uint32_t low = hex4();
          if (low < 0xdc00 || low >= 0xe000) wrong("the second half of a surrogate pair");
          code = 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00);
        }
        append_utf8(s, code);
      } else {
        wrong("an escape");
      }
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : fields) {
    if (key == name) return &value;
  }
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).document(); }

std::string quoted(std::string_view text) {
  std::string s = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      s += '\\';
      s += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04x", c);
      s += buffer;
    } else {
      s += c;
    }
  }
  return s + "\"";
}

}  // namespace torch_ext::runtime
