// tales: plain English stories from a seed, and long-range tasks made of them.
//
// Every story is built on facts that are told early and needed again near its end: where a thing was
// hidden, who gave it, how often the bell must ring, the words of a message. A model with a short
// memory can learn the sentences; only one that looks far back can finish the stories rightly.
//
//   cc -O2 -o tales tales.c && ./tales --bytes 6M --seed 1 -o tales.txt
//
// The same seed gives the same bytes on every machine, and a longer text begins with the shorter one.
// train_nsa.c includes this file with TALES_NO_MAIN and calls tales_make. C11, and C++17 too.
//
// Stories are written in a small template language:
//   [a|b|c]    one of the alternatives, any depth        <list>   one entry of a word list
//   {H} {o.m}  a slot of the story, and a form of it      {k!}     the same, noted as a fact
//   ^          the next letter is a capital               ~        "a" or "an", by the word that follows
//   newline    a new paragraph
// Slots are bound once for each story, which is what keeps a story true to itself.
#include <ctype.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TALES_SEPARATOR "\n\n* * *\n\n"  // behind every story

// ----------------------------------------------------------------------------
// Words

static const char tales_women[] =
  "Ada|Agnes|Anna|Bess|Brida|Clara|Cora|Dora|Edith|Ella|Elsie|Freya|Greta|Gwen|Hanna|Hazel|Ines|Iris|Juno|Karin|"
  "Lena|Lotte|Mabel|Maud|Mina|Molly|Nell|Nora|Olive|Pearl|Petra|Rosa|Ruth|Sanna|Selma|Thea|Tilda|Una|Vera|Willa|Wren|Zelda";
static const char tales_men[] =
  "Abel|Anton|Barnaby|Bram|Casper|Conrad|Davy|Edgar|Emil|Ezra|Felix|Fergus|Finn|Gideon|Gil|Harold|Henrik|Hugo|Ivo|"
  "Jasper|Jonas|Karl|Leo|Matthew|Milo|Ned|Oscar|Otto|Peter|Pip|Quentin|Rolf|Rupert|Samuel|Silas|Theo|Tom|Ulrich|Victor|Walter|Yan";
static const char tales_trades[] =
  "baker|basket maker|beekeeper|blacksmith|boat builder|bookbinder|candle maker|carpenter|clockmaker|cobbler|cooper|"
  "ferry keeper|fiddler|fisher|gardener|glassblower|innkeeper|lamplighter|letter carrier|miller|potter|rope maker|saddler|"
  "shepherd|stonemason|tailor|thatcher|tinker|weaver|wheelwright";
static const char tales_town_heads[] =
  "Alder|Ash|Birch|Black|Brook|Clay|Cold|Dun|Elm|Fern|Grey|Hazel|Heron|Holm|Lark|Linden|Marl|Moss|Oak|Otter|Raven|"
  "Rook|Rush|Salt|Stone|Swan|Thorn|Wether|Willow|Winter";
static const char tales_town_tails[] = "bridge|by|combe|dale|field|ford|gate|ham|haven|mere|stead|ton|well|wick";
static const char tales_materials[] = "amber|bone|brass|bronze|copper|glass|golden|horn|iron|ivory|pewter|silver|tin|wooden";
static const char tales_looks[] =
  "bright|carved|dented|heavy|little|long-lost|narrow|odd|old|plain|polished|round|scratched|small|smooth|thin|tiny|worn";
static const char tales_things[] =
  "bell|bird|box|bracelet|brooch|buckle|button|comb|compass|cup|flute|hairpin|key|lantern|locket|medal|mirror|music box|"
  "needle|ring|spinning top|spoon|star|thimble|watch|whistle";
// Places where people go: the first word is the preposition.
static const char tales_places[] =
  "at the blacksmith's yard|at the boathouse|at the crossroads|at the harbour wall|at the old mill|at the old watchtower|"
  "at the quarry|at the toll gate|behind the schoolhouse|beside the village well|by the ferry landing|by the lime kiln|"
  "by the mill pond|by the stone bridge|by the water trough|by the weir|in the apple orchard|in the beech wood|"
  "in the birch wood|in the empty barn|in the walled garden|near the beehives|near the duck pond|near the sheepfold|"
  "on the common|on the footbridge|on the long pier|on the market square|on the river bank|on the windy hill|under the great oak|"
  "under the lime trees";
// Places where small things are put.
static const char tales_hides[] =
  "behind a loose brick in the chimney|behind the big clock|behind the picture of the mayor|behind the third row of books|"
  "behind the woodpile|beneath the rain barrel|beneath the sundial|between the roots of the pear tree|in a crack of the garden wall|"
  "in the belly of the cold stove|in the bottom of the flour bin|in the lining of an old hat|in the pocket of a coat nobody wore|"
  "in the swallow's nest above the barn door|in the tea tin with the dented lid|in the toe of a cracked boot|inside the blue jug|"
  "inside the broken churn|inside the cuckoo clock|inside the hollow elm|inside the scarecrow's left sleeve|"
  "on top of the tall cupboard|under a flat stone by the gate|under the beehive nearest the fence|under the doorstep|"
  "under the loose board beside the bed|under the seat of the hay cart|under the straw of the broody hen|under the third stair|"
  "up in the fork of the plum tree";
static const char tales_colours[] = "black|blue|brown|crimson|green|grey|orange|purple|red|scarlet|violet|white|yellow";
static const char tales_animals[] =
  "badger|crane|crow|donkey|finch|fox|goat|goose|hare|hedgehog|heron|hound|lark|magpie|mole|otter|owl|pony|raven|robin|"
  "starling|stork|swallow|swan|thrush|toad|weasel|wren";
// What goes into a soup.
static const char tales_ingredients[] =
  "a bay leaf|a bunch of sorrel|a cup of cream|a handful of barley|a handful of dried plums|a pinch of saffron|a roast onion|"
  "a slice of sour apple|a spoonful of honey|a sprig of thyme|half a lemon|nine peppercorns|some smoked fish|the rind of a cheese|"
  "three carrots|two cloves of garlic";
static const char tales_pets[] = "Bandit|Biscuit|Button|Captain|Clover|Dumpling|Flint|Ginger|Mustard|Nettle|Pepper|Pickle|Sergeant|Soot|Teasel|Thimble|Tinker|Turnip";
static const char tales_numbers[] = "three|four|five|six|seven|eight|nine|ten|eleven|twelve";

static const char *const tales_lists[][2] = {
  { "colour", tales_colours }, { "animal", tales_animals }, { "number", tales_numbers }, { "hide", tales_hides },
  { "village", "village|little town|small town|quiet village|old market town|sleepy village" },
  { "lies", "where the road bends down to the river|between two low hills|at the edge of the great wood|a day's walk from the sea|"
            "where three roads meet|on the sunny side of the valley|where the wind smells of [hay|salt|wood smoke|thyme|apples]|"
            "so small that the coach often drove past it|known for its [bells|cheese|storms|honey|ducks]" },
  { "house", "small|narrow|crooked|low|tall|tidy|thatched|white|draughty|warm" },
  { "good", "quick|patient|stubborn|cheerful|quiet|curious|careful|brave|thoughtful|clever|gentle|restless" },
  { "weekday", "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday" },
  { "later", "The next morning|Two days later|On <weekday>|Before the week was out|Some days afterwards|One afternoon|"
             "Early one morning|Not long after that|The following evening|Another day|In the middle of the week|The week after|"
             "Late one afternoon|One day|When <weekday> came|The day after that|Towards the end of the week" },
  { "spring", "rain and sun took turns that week|the hedges were full of new leaves|the snow had gone, and the ditches ran loud with water|"
              "cuckoos called from both sides of the valley|the first swallows were back|lambs were crying in every field" },
  { "summer", "the days were long and hot|dust lay on the road and the cows stood in the shade|bees hummed in the clover from morning to night|"
              "it had not rained for <number> weeks|the evenings stayed light until nobody wanted to go to bed|haymaking had begun" },
  { "autumn", "yellow leaves blew along the lane|the apples were ripe, and the mornings smelled of smoke|geese flew over the roofs every evening|"
              "mist lay in the fields until noon|the first fires were lit|the wind pulled at the shutters" },
  { "winter", "snow lay on the roofs, and the pump had frozen|the nights were long and full of stars|icicles hung from every gutter|"
              "the river had stopped talking under its ice|people walked quickly and spoke through their scarves|"
              "it was so cold that the ink froze in the school" },
  { "nothing", "there was nothing there but dust|there was only a sleepy spider|nothing|a button and some crumbs, that was all|nothing but a dead wasp|nothing at all|only crumbs|not a trace|"
               "it was not there|{H.he} found an old nail, and that was all|no, not there either" },
  { "glad", "glad|happy|pleased|proud|delighted" },
  { "soft", "softly|quietly|in a low voice|after a while|slowly|with a smile|kindly" },
  { "food", "apple pancakes|barley broth|bean soup|bread and cheese|buttered noodles|cabbage pie|dumplings with plums|fish stew|"
            "leek pie|mushroom soup|oat cakes|onion tart|pea soup|potato cakes|pumpkin soup|rye bread with honey" },
  { "near", "next door|across the lane|two doors down|on the other side of the square|just beyond the hedge" },
  { "friend", "{F}, ~ {F.job} who lived <near>" },
  { "think", "{H} turned it over in {H.his} mind|{H} said nothing for a while|{H} looked at the floor|{H} bit {H.his} lip|{H} thought hard|"
             "{H} took a deep breath|{H} scratched {H.his} head" },
  { "walked", "walked|went|hurried|ran|set off" },
  { "trouble", "the [wheel|axle] of {S.his} cart had broken|{S.his} [cow|donkey|goat] had gone through the rotten planks of a ditch bridge|"
               "a gust had thrown {S.his} [baskets|papers|hats] all over the road|{S.his} boat had slipped its rope and was drifting away|"
               "the strap of {S.his} pack had torn, and [apples|spoons|candles|loaves] were rolling down the hill" },
};

// ----------------------------------------------------------------------------
// Random numbers: splitmix64, one stream for each story

typedef struct { uint64_t state; } TalesRng;

static uint64_t tales_next(TalesRng *rng) {
  uint64_t z = (rng->state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static int tales_below(TalesRng *rng, int n) {  // n is tiny beside 2^32: the bias cannot be seen
  return (int)(((tales_next(rng) >> 32) * (uint64_t)n) >> 32);
}

static TalesRng tales_stream(uint64_t seed, uint64_t index) {
  TalesRng rng;
  rng.state = seed;
  rng.state = tales_next(&rng) ^ (index * 0xD1342543DE82EF95u);
  rng.state = tales_next(&rng);
  return rng;
}

// ----------------------------------------------------------------------------
// Text that grows, and the story that is being told

typedef struct {
  char *text;
  int64_t len, cap;
  int failed;  // out of memory: everything after is dropped, the caller is told at the end
} TalesText;

static void tales_append(TalesText *out, const char *text, int64_t n) {
  if (out->len + n + 1 > out->cap) {  // room for the text and a final NUL
    int64_t cap = 2 * (out->cap + n) + 16384;
    char *grown = out->failed ? NULL : (char *)realloc(out->text, (size_t)cap);
    if (!grown) { out->failed = 1; return; }
    out->text = grown;
    out->cap = cap;
  }
  memcpy(out->text + out->len, text, (size_t)n);
  out->len += n;
}

static inline void tales_put(TalesText *out, char c) {
  if (out->len + 2 > out->cap) tales_append(out, &c, 1);
  else out->text[out->len++] = c;
}

typedef struct { char slot; int64_t at; int len; } TalesFact;  // a slot's words stand at this place of the text

enum { TALES_MAX_FACTS = 96 };

typedef struct {
  TalesRng rng;
  TalesText *out;
  const char *slot[128];     // the words of each slot: "small silver key", "Ada", "by the mill pond"
  const char *brief[128];    // a person's trade, a thing's short name
  unsigned char female[128];
  const char *season;
  char arena[8192];          // the words of slots that were made for this story
  int arena_used;
  int capital, article;      // what ^ and ~ left to be done at the next letter
  int quiet;                 // no capitals: words for a slot
  int threads[4], num_threads;  // which of tales_threads run through this story
  TalesFact facts[TALES_MAX_FACTS];
  int num_facts;
} TalesStory;

// Is the next letter the first of a sentence?
static int tales_at_start(const TalesText *out) {
  int64_t n = out->len;
  if (n > 0 && (out->text[n - 1] == '"' || out->text[n - 1] == '\'')) n--;
  if (n == 0 || out->text[n - 1] == '\n') return 1;
  return n > 1 && out->text[n - 1] == ' ' && strchr(".?!", out->text[n - 2]);
}

static void tales_letter(TalesStory *s, char c) {
  TalesText *out = s->out;
  if (c >= 'a' && c <= 'z') {
    if (s->article && strchr("aeiou", c) && !out->failed) {  // "a " was written: make it "an "
      out->text[out->len - 1] = 'n';
      tales_put(out, ' ');
    }
    int after = out->len > 0 ? out->text[out->len - 1] : ' ';
    if (s->capital || (!isalpha(after) && !s->quiet && tales_at_start(out))) c = (char)(c - 'a' + 'A');
  }
  if (c != ' ' && c != '"' && c != '\'') s->article = s->capital = 0;
  tales_put(out, c);
}

static void tales_word(TalesStory *s, const char *word) {
  if (*word) tales_letter(s, *word++);
  tales_append(s->out, word, (int64_t)strlen(word));
}

// One of the alternatives "a|b|c" that begin at p; *end is set to where they stop (a ']' or the end of the string).
static const char *tales_pick(TalesRng *rng, const char *p, const char **pick_end, const char **end) {
  const char *starts[64];
  int n = 0, depth = 0;
  starts[n++] = p;
  for (p += strcspn(p, "[|]"); *p && !(depth == 0 && *p == ']'); p += 1 + strcspn(p + 1, "[|]")) {
    if (*p == '[') depth++;
    else if (*p == ']') depth--;
    else if (depth == 0 && n < 63) starts[n++] = p + 1;
  }
  *end = p;
  starts[n] = p + 1;
  int k = tales_below(rng, n);
  *pick_end = starts[k + 1] - 1;
  return starts[k];
}

static const char *tales_pronoun(const char *form, int female) {
  static const char *const forms[][3] = {
    { "he", "he", "she" }, { "him", "him", "her" }, { "his", "his", "her" }, { "himself", "himself", "herself" }, { "child", "boy", "girl" } };
  for (int i = 0; i < 5; i++) if (!strcmp(form, forms[i][0])) return forms[i][1 + female];
  return NULL;
}

static void tales_title(TalesStory *s, const char *words) {  // Big Words, but for the small ones
  static const char small[] = " a at behind beside by in near of on the under ";
  for (const char *w = words; *w; w++) {
    char word[16];
    size_t n = strcspn(w, " ");
    if (w == words || w[-1] == ' ') {
      snprintf(word, sizeof word, " %.*s ", n < 12 ? (int)n : 12, w);
      if (!strstr(small, word)) s->capital = 1;
    }
    tales_letter(s, *w);
  }
}

// {slot.form}: he him his himself; job (a person's trade); s (a thing's last word); m (a thing without its first
// adjective); at (a place with its preposition; without a form the place alone); T and J (m and job, in a title)
static void tales_slot(TalesStory *s, char name, const char *form, int fact) {
  const char *words = s->slot[(int)name], *brief = s->brief[(int)name];
  const char *pronoun = tales_pronoun(form, s->female[(int)name]);
  int is_place = strchr("pqrbeK", name) != NULL, is_thing = strchr("ouiUVL6789", name) != NULL && brief;
  if (pronoun) words = pronoun;
  else if (*form == 'j' || *form == 's' || *form == 'J') words = brief;
  else if ((is_thing && (*form == 'm' || *form == 'T')) || (is_place && !*form)) words = strchr(words, ' ') + 1;
  if (*form == 'T' || *form == 'J') tales_title(s, words);
  else tales_word(s, words);
  if (fact && s->num_facts < TALES_MAX_FACTS) {
    TalesFact f;
    f.slot = name;
    f.len = (int)strlen(words);
    f.at = s->out->len - f.len;
    s->facts[s->num_facts++] = f;
  }
}

static const char *tales_list(const TalesStory *s, const char *name, size_t n) {
  if (n == 7 && !memcmp(name, "weather", 7)) {
    name = s->season;
    n = strlen(name);
  }
  for (size_t i = 0; i < sizeof tales_lists / sizeof tales_lists[0]; i++)
    if (!strncmp(tales_lists[i][0], name, n) && !tales_lists[i][0][n]) return tales_lists[i][1];
  return "<unknown list>";  // a slip in a template: the tests look for it
}

static void tales_expand(TalesStory *s, const char *p, const char *end) {
  while (p < end) {
    char c = *p++;
    if (c == '[') {
      const char *pick_end, *close;
      const char *pick = tales_pick(&s->rng, p, &pick_end, &close);
      tales_expand(s, pick, pick_end);
      p = close + 1;
    } else if (c == '{') {
      char name = *p++, form[16];
      int n = 0, fact = 0;
      for (; *p != '}'; p++) {
        if (*p == '!') fact = 1;
        else if (*p == '^') s->capital = 1;
        else if (*p != '.' && n < 15) form[n++] = *p;
      }
      p++;
      form[n] = 0;
      tales_slot(s, name, form, fact);
    } else if (c == '<') {
      const char *close = strchr(p, '>'), *pick_end, *list_end;
      const char *list = tales_list(s, p, (size_t)(close - p));
      const char *pick = tales_pick(&s->rng, list, &pick_end, &list_end);
      tales_expand(s, pick, pick_end);
      p = close + 1;
    } else if (c == '^') s->capital = 1;
    else if (c == '~') { tales_letter(s, 'a'); s->article = 1; }
    else if (c == '\n') { tales_put(s->out, '\n'); tales_put(s->out, '\n'); }
    else {
      tales_letter(s, c);
      if (!s->article && !s->capital) {  // the rest of a plain stretch needs no care
        const char *stop = p + strcspn(p, "[{<^~\n");
        if (stop > end) stop = end;
        tales_append(s->out, p, stop - p);
        p = stop;
      }
    }
  }
}

static void tales_say(TalesStory *s, const char *text) {
  tales_expand(s, text, text + strlen(text));
}

// ----------------------------------------------------------------------------
// The cast: people, things and places of one story, no two alike

static const char *tales_keep(TalesStory *s, const char *text, int n) {
  if (s->arena_used + n + 1 > (int)sizeof s->arena) n = 0;  // cannot happen: a story needs about 1 kB
  char *copy = s->arena + s->arena_used;
  memcpy(copy, text, (size_t)n);
  copy[n] = 0;
  s->arena_used += n + 1;
  return copy;
}

// Expand a template into the arena instead of the text.
static const char *tales_note(TalesStory *s, const char *text) {
  int64_t from = s->out->len;
  s->quiet = 1;
  tales_say(s, text);
  s->quiet = 0;
  const char *note = s->out->failed ? "" : tales_keep(s, s->out->text + from, (int)(s->out->len - from));
  s->out->len = from;
  return note;
}

// One entry of a list, such as nothing else in this story is called.
static const char *tales_fresh(TalesStory *s, const char *list) {
  for (;;) {
    const char *pick_end, *end, *pick = tales_pick(&s->rng, list, &pick_end, &end);
    size_t n = (size_t)(pick_end - pick);
    int taken = 0;
    for (int i = 0; i < 128; i++) {
      const char *a = s->slot[i], *b = s->brief[i];
      taken |= a && *a == *pick && !strncmp(a, pick, n) && !a[n];
      taken |= b && *b == *pick && !strncmp(b, pick, n) && !b[n];
    }
    if (!taken) return tales_keep(s, pick, (int)n);
  }
}

static void tales_bind(TalesStory *s, char slot, const char *list) { s->slot[(int)slot] = tales_fresh(s, list); }

static void tales_bind_note(TalesStory *s, char slot, const char *text) { s->slot[(int)slot] = tales_note(s, text); }

static void tales_bind_person(TalesStory *s, char slot) {
  s->female[(int)slot] = (unsigned char)tales_below(&s->rng, 2);
  tales_bind(s, slot, s->female[(int)slot] ? tales_women : tales_men);
  s->brief[(int)slot] = tales_fresh(s, tales_trades);
}

static void tales_bind_young(TalesStory *s, char slot) {  // "girl", "young potter", "miller's son"
  tales_bind_person(s, slot);
  const char *trade = s->brief[(int)slot];
  char job[64];
  int kind = tales_below(&s->rng, 3);
  if (kind == 0) snprintf(job, sizeof job, "%s", s->female[(int)slot] ? "girl" : "boy");
  else if (kind == 1) snprintf(job, sizeof job, "young %s", trade);
  else snprintf(job, sizeof job, "%s's %s", trade, s->female[(int)slot] ? "daughter" : "son");
  s->brief[(int)slot] = tales_keep(s, job, (int)strlen(job));
}

static void tales_bind_thing(TalesStory *s, char slot) {  // "small silver key", brief "key"
  char words[64];
  const char *thing = tales_fresh(s, tales_things);
  const char *look = tales_fresh(s, tales_looks), *material = tales_fresh(s, tales_materials);
  snprintf(words, sizeof words, "%s %s %s", look, material, thing);
  s->brief[(int)slot] = thing;
  s->slot[(int)slot] = tales_keep(s, words, (int)strlen(words));
}

static void tales_bind_town(TalesStory *s, char slot) {
  const char *head = tales_fresh(s, tales_town_heads), *tail = tales_fresh(s, tales_town_tails);
  char words[64];
  snprintf(words, sizeof words, "%s%s", head, tail);
  s->slot[(int)slot] = tales_keep(s, words, (int)strlen(words));
}

// ----------------------------------------------------------------------------
// Threads: small facts of everyday life, told in the opening and again at the close

static const struct { char slot; const char *words, *early, *late; } tales_threads[] = {
  { 'c', "<colour> [coat|cloak|jacket|cape|apron|waistcoat]",
    " [Summer and winter|On working days and Sundays|Whatever the weather], {H} wore ~ {c!} [that {E} had sewn|with <number> [wooden|horn|brass] buttons|"
    "that was a little too big|with pockets deep enough for [bread|books|both hands]].",
    " [{H} hung the {c!} on its nail|The {c!} went back on its nail|{H} shook the dust from the {c!} and hung it up][ by the door| to dry|]." },
  { 'd', NULL,
    " There was also ~ [old|lively|lazy|clever|small] {d.job} called {d!}, who [followed {H} everywhere|was afraid of nothing but geese|knew every kitchen in {t}|slept in the wood box].",
    " {d!} the {d.job} [was already asleep by the stove|put {d.his} head on {H}'s foot|sneezed, and went back to sleep|looked as if {d.he} had done it all {d.himself}]." },
  { 'P', "[A door that is knocked on twice will open|Slow feet find the path|What two people carry weighs half|The river holds no grudges|"
         "Measure the rope before you climb down|Even the longest night ends at a window|Ask the way before you are lost|"
         "A small lamp is enough for one room|Good bread needs a patient oven|The last apple is the sweetest|A borrowed spade digs two gardens|"
         "Listen first, and then listen again|Every gate was built to be opened|Count your friends before you count your coins|"
         "Wet boots dry, but sharp words stay|Who shares the umbrella gets one wet shoulder]",
    " \"{P!},\" {E} [liked|used] to say[, whether it fitted or not|, usually with flour on {E.his} hands| at least once a day|].",
    " \"{P!},\" said {E} <soft>[, and this time {H} understood what it meant|, and for once nobody laughed|, and {H} nodded|]." },
  { 'z', "[a loaf of rye bread|a jar of honey|a bundle of dry sticks|a bunch of wild mint|a basket of plums|a ball of blue wool|a pot of goose fat|"
         "a sack of oats|six brown eggs|a pound of candles|a bag of chestnuts|a spool of white thread]",
    " [That week|The day before|Not long before], as so often, {H} had promised to bring {E} {z!}, [and a promise was a serious thing in that house|"
    "though there seemed to be no hurry|and had said \"[soon|tomorrow|I shall not forget]\"].",
    " And on the kitchen table lay {z!}, [for {H} had remembered the promise|just as {H} had promised|because a promise is a promise][, late as it was|]." },
  { 'y', "[a smooth white pebble|a bent copper penny|a dried bean|a fish hook|a goose feather|a blue glass bead|a stub of chalk|a walnut shell|an acorn with its cap|a lump of amber]",
    " In {H.his} [left|right|coat] pocket {H} always carried {y!}[, which was good luck| and would not say why|, and could not think without it].",
    " {H} felt in {H.his} pocket: {y!} was still there[, and seemed a little warm|, as lucky as ever|]." },
  { 'D', "[Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday]",
    " ^{E} cooked {f!} every {D!}, [and half the street could smell it|and {H} could have eaten it on any other day as well|as {E.his} own mother had done].",
    " When {D!} came, {E} put {f!} on the table, as on every {D}, [and {H} had two helpings|and for once enough for everybody|and nobody spoke until the pot was empty]." },
  { 'j', "<number> <colour> [cups|bowls|plates|mugs]",
    " On the shelf over the stove stood {j!}, [the pride of the house|and not one of them was chipped|a wedding present from long ago].",
    " {E} took down two of the {j!} from the shelf, [and they drank to it|and they talked until the candle was short|and poured until they were full]." },
  { 'X', NULL,
    " There was only one thing that troubled {H}: {H.he} owed {X!} the {X.job} {x!}[, and {X} never forgot a debt| since the fair|, and it was nearly the end of the month].",
    " [Before going to bed|On the way home|That same evening] {H} stopped at the door of {X!} the {X.job} and paid what {H.he} owed, {x!}[, and that was that|, with thanks|]." },
  { 'g', "<colour>",
    " Theirs was the only {g!} door in the street[, so that nobody ever had to ask twice| and one could see it from far off|; {E} painted it every spring].",
    " [There was light behind the {g!} door|The {g!} door closed behind them|{H} pushed open the {g!} door], and [the kettle was singing|the day was over|it was good to be home]." },
  { 'T', "[The Miller's Goose|Three Ships Coming|Rain on the Barley|The Sleepy Drummer|Apples for Anna|The King of the Frogs|Over the Hills by Morning|The Old Grey Mare's Hat|Lanterns on the Water|Sweep the Stairs]",
    " At work and on the road {H} whistled one and the same tune, \"{T!}\"[, not always in time|, which {E} had taught {H.him}|].",
    " And [whoever listened at the window|anyone who passed] could hear {H} whistling \"{T!}\"[, slowly this time|, a little out of tune|]." },
};
enum { TALES_THREADS = sizeof tales_threads / sizeof tales_threads[0] };

// ----------------------------------------------------------------------------
// Interludes: a page from an ordinary day. They carry nothing that the plot needs; they are the distance
// over which it has to be remembered. M, i and e are a person, a thing and a place of this page only.

static const char *const tales_days[] = {
  "<later> there was a market {e.at}. {M} the {M.job} had ~ {i} for sale and wanted [too much|<number> coins] for it, and {H} [looked at it for so long that {M} began to laugh|"
  "asked the price twice and went away twice]. [In the end {H.he} bought a bag of [nuts|cherries|hot rolls] and ate them on the wall.|In the end a [lady|farmer] from the next valley bought it, and {H} was almost glad.]",
  "<later> {H} helped {M} the {M.job} to [carry wood|mend a fence|wash the windows|pick beans|move a cupboard]. It took [all day|until supper], and {M} talked the whole time about "
  "[a brother in the city|the winter when the wolves came down|the price of [wool|butter|nails]|~ {i} that had been stolen from {M.him} as a child]. \"[Come again|You are a good worker],\" {M.he} said at the end, and [paid {H.him} with a pear|meant it].",
  "<later> it rained so hard that nobody went out. {E} [mended stockings|shelled peas|sorted buttons], and {H} [read aloud from the almanac|drew a map of the whole valley|built a tower of cups]. "
  "[When the rain stopped, the whole street smelled of wet stone.|Towards evening they heard somebody singing in the rain, and it was only {M} the {M.job}, going home.]",
  "<later> ~ <animal> got into the house. It ran [under the bed|round the table|over the beds] while {E} [stood on a chair|held the broom like a sword], and {H} [opened every window|laughed until {H.he} had to sit down]. "
  "In the end it [went out by itself, through the door|jumped into the flour and left white footprints all the way to {e}].",
  "<later> {M} the {M.job} came to borrow a [ladder|kettle|hammer|sieve] and stayed for [two hours|supper]. {M.^he} had seen ~ <animal> {e.at}, as big as a [calf|cupboard]. [Nobody believed it|{E} believed half of it], but it was a good story.",
  "<later> {H} walked out to {e}, for no reason at all. ~ <animal> was [standing there in the morning light|calling from the other side|busy with a nest]. {H} kept still [until {H.his} feet were cold|for as long as {H.he} could], and then [went home and told nobody|it looked at {H.him}, and was gone].",
  "<later> a wedding went through {t}. {M} the {M.job} was the groom's cousin and played the [drum|fiddle|bagpipes] [badly|as loudly as {M.he} could]. There was cake for everyone, and {H} [danced with three people and trod on all of them|got a ribbon to keep].",
  "<later> {H} had a cold and had to stay in bed. {E} brought [hot milk|elderberry tea|a hot brick in a cloth], and through the window came the noise of [the street|hammers and hens|children playing]. {H} [counted the beams in the ceiling, <number> of them|slept, and dreamed of ~ {i} that could talk].",
  "<later> the [roof leaked|chimney smoked|well rope broke], and {M} the {M.job} had to be sent for. \"[Who has built this?|This was mended by ~ <animal>!]\" said {M}, as {M.he} always did. It was [put right by evening|done in an hour], and cost <number> coins.",
  "<later> a travelling show came and put up its tent {e.at}. There was a man who swallowed [fire|ribbons], and ~ <animal> that could count to <number>. {H} [gave it a bun|saw how the trick was done, and did not tell].",
  "<later> the school was shut because {M} the {M.job} had found ~ <animal> in the [stove pipe|bell tower]. {H} spent the free day {e.at}, [throwing stones into the wind|making a whistle from a willow twig|doing nothing, and doing it well].",
  "<later> {M} the {M.job} lost ~ {i}, and everyone had to help to look for it. It was found [in {M.his} own pocket|under {M.his} own hat|in a pie], and {M} [bought lemonade for the whole street|did not come out of the house for two days].",
};
static const char *const tales_friend_days[] = {
  "<later> {H} and {F} went to {e} to [fish|pick berries|fly a kite|look for birds' nests]. They [caught nothing but a boot|came home with scratched knees|stayed until the first star]. \"[Tomorrow it will go better|This was a good day],\" said {F}.",
  "<later> {F} [came running with the news|knocked at the window to say] that ~ <animal> had been seen {e.at}. They waited there [for an hour|until dusk], eating [bread and onions|sour apples]. What came in the end was {M} the {M.job}, [who was just as surprised as they were|looking for ~ {i}].",
  "<later> {F} and {H} played at [ships|kings and beggars|merchants] {e.at}. {F} was the [captain|king], because it was {F.his} turn, and {H} was [the storm|the enemy|everybody else]. They forgot the time[ and had to run home in the dark| and missed their supper|].",
  "<later> {F} taught {H} to [whistle on two fingers|skip stones|tie a bowline|walk on stilts]. It looked easy when {F} did it. {H} tried until [{H.his} ears were red|it was dark|{M} the {M.job} shouted from a window that it was enough], and [on the very last try it worked|could not do it at all, and did not mind].",
};
static const char *const tales_roads[] = {
  "On the [second|third|next] day the road climbed. <weather>, and {H} [ate the last of the bread under a thorn bush|counted milestones until there were none]. Far below, {M} the {M.job} was driving ~ <animal> along the valley, [no bigger than a bean|and waved a hat].",
  "That night {H} slept [in a hayloft|in a charcoal burner's hut|in an empty sheepfold|at an inn with <number> beds and no pillows]. The owner was {M}, ~ {M.job} by trade, who [snored like a saw|told stories until the fire went out|would not take money]. [In the morning the world was white with mist.|In the morning a cock crowed on the window sill.]",
  "Then came a long wood. ~ <animal> [went before {H.him} on the path for a while, as if it knew the way|called and called and was never seen]. {H} [sang to keep {H.his} courage up|walked in the cart ruts, where it was dry], and was glad when the trees ended.",
  "At a ford {H} met {M} the {M.job}, who was going the other way. They sat down on the bank and shared [a sausage|a cold pie|apples and cheese]. \"[Is it far|What is it like, where you come from]?\" asked {H}. \"[Far enough|It is much like here, only the hills are lower],\" said {M}, [chewing|and laughed].",
  "It rained for a whole day. {H} [waited in a barn with ~ <animal> and a man who never spoke|walked on with a sack over {H.his} head]. Towards evening there was a [rainbow|strip of yellow sky], and the puddles [shone like coins|were full of it].",
  "One village was keeping a feast, and nobody was allowed to pass without dancing. {H} danced with {M} the {M.job}, ate <number> pancakes, and [woke up in a cart, covered with straw|left with sore feet and a paper hat].",
  "The signpost at the next crossroads had [lost its arms|fallen into the ditch]. {H} [threw a stick into the air and went the way it pointed|waited until {M} the {M.job} came by and asked]. It was the right way, though [a long one|{H.he} was not sure of it until noon].",
  "For <number> miles the road followed a river. Barges went by with [timber|clay pots|sleeping dogs], and the skipper of the last one, {M}, called out, \"[Jump on|Where to]?\" So {H} rode [as far as the next lock|until sunset], and [peeled potatoes for it|learned the names of all the bends].",
};

// ----------------------------------------------------------------------------
// Plots that are two texts: what happens early, and, after the interludes, what comes of it
//   H hero  F friend  E the elder at home  S a stranger with a trade  o u v things  p q r places  k l h hiding places
//   n N numbers  m message  w password  a animal  A C colours  t home town  s another town

enum { TALES_ALONE, TALES_WITH_FRIEND, TALES_ON_THE_ROAD };  // where the interludes take place

typedef struct { const char *title, *early, *late; int where; } TalesPlot;

static const TalesPlot tales_plots[] = {
  { "[The {o.T}|{H} and the {o.T}|What {H} Hid|A Safe Place|The Good Hiding Place]",
    "\nOne evening {E} took ~ {o!} from [a drawer|a knotted handkerchief|the high shelf] and laid it in {H}'s hand. \"[I have carried this for forty years|My own mother gave it to me|It is older than this house],\" {E.he} said. "
    "\"[Now it is your turn to keep it|From today you shall look after it]. Put it where no stranger would think of looking.\""
    "\n[{H} lay awake over it|{H} walked twice round the house|{H} looked at every corner and shelf]. In the end {H.he} hid the {o.s} {k!} and told nobody but <friend>. \"[I shall not say a word|My lips are sewn up|A secret is safe with me],\" said {F}.",
    "\n<later> {E} came in with a letter. \"{S} the {S.job} is coming from {s},\" {E.he} said. \"It was {S} who made the {o.m}, when we were both young. Fetch it, {H}. [{S.^he} must see it once more|We shall put it on the table for {S.him}].\""
    "\nBut so much had happened since then that {H} could not remember where it was. {H.he} looked {l}: <nothing>. {H.he} looked {h}: <nothing>. [{H.^his} ears grew hot|{H} sat down on the floor].[ \"I have lost it,\" {H.he} whispered.|]"
    "\n\"[What are you hunting for|Have you lost something]?\" asked {F}, who had just come in.\n\"The {o.s},\" said {H}. \"I hid it so well that I have hidden it from myself.\""
    "\n\"But you told me,\" said {F}. \"It is {k!}.\""
    "\nAnd so it was: ~ {o!}, [a little dusty|cold and bright|just as it had been]. {S} the {S.job} [held it to the light|turned it over and over] that evening and said <soft>, \"[I could not make it better today|So it has been in good hands].\"", TALES_WITH_FRIEND },

  { "[A Good Turn|The {S.J} {p.T}|One Hand Washes the Other|What {S} Promised|{H} and the Stranger]",
    "\n<later> {H} was on the way to {q} when {H.he} heard shouting {p.at!}. It was a stranger, and <trouble>. {H} [did not ask|put down the basket|ran]. It took [an hour|until noon] and cost {H.him} [a sleeve|a shoe|two wet feet], but then all was well again. "
    "To hold the last knot {H.he} even gave away {H.his} own {o!}, for [nothing else was small enough|there was nothing else at hand]."
    "\n\"I am {S!} the {S.job},\" said the stranger. \"[You asked for nothing, so I promise you something|I have no money, but I have a good memory]. If you ever need help, knock {n!} times at my door {r.at!}, by day or by night, and I will come.\"\n<think>. \"[I shall remember|Thank you],\" {H.he} said, and they shook hands on it.",
    "\nThen {E} fell ill. {E.^he} lay [with closed eyes|as white as the sheet], and the doctor lived in {s}, on the far side of the water[, and the bridge was down|, and the road was gone]. \"[Nobody can get across tonight|Nobody will go out in this weather],\" people said."
    "\n{H} stood at the window. Then {H.he} remembered what {S} the {S.job} had promised {p.at!}, and ran all the way to {r}, and knocked: {n!} times."
    "\n\"[Who is it|At this hour]?\" called a voice. The door opened. {S!} held up a lamp, and in {S.his} other hand {S.he} had ~ {o!}. \"I have kept it where I can see it,\" {S.he} said. \"[I knew you would come some day|I have not forgotten]. What do you need?\""
    "\nBefore midnight {S} had [found a way across|brought {H} over] and before morning the doctor was there. In <number> days {E} was [sitting up|asking for soup|scolding the hens] again. \"[Who was that|Whom have we to thank]?\" {E.he} asked. \"{S} the {S.job},\" said {H}, \"whom I met {p.at}.\"", TALES_ALONE },

  { "[The Secret|{H} Keeps a Secret|Who Comes by Night?|The {C.T} Hat|Footprints at the Door]",
    "\nThat year [a poor teacher|an old sailor|a sick organist] named {B!} lived {q.at!}, and every [Monday|Friday|Sunday] morning {J!} stood before {B.his} door. Nobody knew who brought it. \"It is {Y!},\" said <friend>."
    "\n{H} wanted to know. {H.he} sat the whole night {p.at}, and when the moon was high somebody came by with a heavy load: somebody in ~ {C!} hat. It was {S!} the {S.job}, [the crossest person in {t}|whom everyone called a miser|who never said good morning]."
    "\n\"[So you have seen me|Come out, whoever you are],\" said {S} <soft>. \"Will you do something difficult for me? Tell nobody.\"\n<think>. \"I promise,\" {H.he} said.",
    "\nThe winter after that came a morning without {J!}. {B} waited, {q.at!}, and the whole town [guessed|talked] again. \"[So it was not {Y!} at all|Then it was not {Y!}|It cannot have been {Y!}],\" said {F}. {H} alone knew better. {H.he} went to the house of {S!} the {S.job} and found {S.him} in bed with a [broken leg|fever]."
    "\n\"[Who sent you|What do you want]?\" growled {S}.\n\"Nobody. I have not told,\" said {H}. \"Lend me your {C!} hat, and tell me how much to carry.\""
    "\nThat night, and every week until spring, somebody in ~ {C} hat went out to {q}. {F}, who could not sleep, saw it from the window. \"[It is somebody short|It has shrunk],\" {F.he} told everyone the next day. {S} heard of it and laughed for the first time in [seven|ten|twenty] years. And {H} [kept the promise|never said a word].", TALES_WITH_FRIEND },

  { "[The Quarrel|Two Friends and One {o.T}|Who Saw It First?|{H} and {F}|The {o.T}]",
    "\n{H} and {F}, ~ {F.job} who lived <near>, had been friends [since they could walk|for as long as they could remember]. Then, {p.at!}, they found ~ {o!}. {F} saw it first, [shining in the grass|half under a stone]; {H} picked it up.\n\"It is mine,\" said {F}. \"I saw it.\"\n\"It is mine,\" said {H}. \"I have it.\""
    "\nOne word gave the next. {F} called {H} [a thief|a magpie|greedy]. {H} called {F} [a liar|a goose|something worse]. Then {H} put the {o.s} {k!} and {F} slammed the gate, and [they did not speak any more|from that hour each walked on a different side of the street].",
    "\nThen [the fog came|a storm broke|night fell early], and {F} had not come home. \"{F.^he} was going to {q!},\" said {F}'s [mother|father|brother], \"and {F.he} has no light.\" [Everyone looked in the wrong places|People ran about with lanterns]. {H} [did not wait to be asked|forgot to be angry] and {H.he} <walked> to {q}."
    "\n{F} was sitting there with [a twisted foot|one boot in the mud] and [wet eyes|chattering teeth]. \"[You came|I called and called],\" said {F}. {H} [lifted {F.him} up|took {F.him} on {H.his} back], and for a while there was nothing to hear but breathing."
    "\n\"You did see it first,\" said {H} at last.\n\"But you picked it up,\" said {F}, and then they both laughed."
    "\nThe next day {H} took the {o!} from its place {k!}. They carried it together to {p!}, where they had found it, and [hung it on a branch for whoever might have lost it|put it back under its stone|agreed that it should live with {F} one week and with {H} the next].", TALES_ALONE },

  { "[The Bell|{n.T} Strokes|The Bell in the Fog|When the Bell Rings|A Sign in the Dark]",
    "\n{E} had once [sailed|worked on the boats|kept the watch], and knew what fog was. \"Listen,\" {E.he} told {H} and <friend>. \"If ever one of you is out {q.at!} and cannot see the way, the other shall ring the old bell {p.at!}. {n!} strokes, then a rest, then {n} again. Other bells ring {N} or one. {n.^} is ours.\""
    "\n\"{n.^},\" said {H}.\n\"{n.^},\" said {F}, and [drew it with a wet finger on the table|cut that many notches in a stick]. [Then they went out to play and thought no more of it|It was sunny, and they nearly laughed].",
    "\nOne afternoon {F} went out {q.at!} alone[ to fetch a lost oar| to gather reeds| after a stray lamb|]. Within an hour the fog was so thick that a [hen could not find her own feet|hand before the eyes was gone]. {H} stood in the doorway and [called|shouted]. No answer came."
    "\nThen {H.he} remembered. {H.he} ran to the bell {p.at!}, [slipping on the stones|losing a shoe on the way], and pulled the rope: {n!} strokes, and a rest, and {n} strokes again. From {s} another bell answered with {N}, [for some other ship|for evening prayers], but {H} did not lose count."
    "\n[An hour went by|{H.^his} arms were like lead]. Then there were steps in the grey, and {F} came out of it, [wet to the knees|as pale as cheese]. \"I heard bells on every side,\" {F.he} said. \"I did not know which to follow. Then I counted {n!}, and I knew that it was you.\"", TALES_WITH_FRIEND },

  { "[The Message|Word for Word|The Messenger|What the Old {S.J} Said|{H} Carries a Message]",
    "\n<later> {S} the {S.job} called {H} in from the street. {S} was too old to travel, and had one thing to say to one person in {s}. \"I cannot write,\" said {S}, \"so you shall be my letter. Go to {B!} the {B.job}, who lives {q.at!}, and say this: '{m!}.' Not a word more, and not a word less.\""
    "\n\"What does it mean?\" asked {H}.\n\"[That is for {B} to know|It means what it says],\" said {S}. {H} said it over [three times|until {S} nodded], and set off the same day.",
    "\nAt last {H} stood before the house {q.at!}. {B} the {B.job} was [chopping wood|hanging out washing|asleep on the bench], and did not look friendly. \"Well?\" said {B}.\n<think>. {H.^his} head felt quite empty. Then the words came, one behind the other, as they had gone in: \"'{m!}.' That is what {S} the {S.job} told me to say.\""
    "\n{B} sat down. {B.he} [laughed, and had to wipe {B.his} eyes|was silent for a long time|turned quite pale]. \"[When we were young it was our sign|Forty years ago we agreed on those words],\" {B.he} said. \"It means: [all is forgiven, come home|the door is open|I was wrong]. Say it once more.\"\n\"{m!},\" said {H}."
    "\nThey went back together, and {S} was standing at the gate. Nobody knows what the two old friends said to each other; but {H} [was given a whole cake|had to sit between them at supper][ and fell asleep over it|].", TALES_ON_THE_ROAD },

  { "[The Password|Who Is There?|Two Words in the Dark|The Hut {p.T}|A Knock at the Door]",
    "\n{H} and <friend>, had built a hut {p.at!}, of [old doors|driftwood|fence posts and moss]. Nobody could come in without the password, and they took all afternoon to find a good one. \"'{w!}',\" said {F} at last, and {H} said that it was [perfect|the best there had ever been]. They [wrote it down and ate the paper|swore to tell nobody]."
    " Inside, {k!}, they kept their treasure: ~ {o!}.",
    "\nThen thieves were seen in the valley, and one night {H} sat alone in the hut to guard the treasure. Something [scratched|rustled|breathed] outside. There was a knock.\n\"Who is there?\" said {H}[, as deep as {H.he} could|, and {H.his} voice shook].\n\"{F},\" said somebody. \"Let me in. They are coming.\""
    "\n<think>. It might be {F}. It might be anybody. \"Then say the password,\" said {H}.\n\"'{w!}',\" said the voice, and {H} pulled back the bolt."
    "\nIt was {F} indeed, [out of breath|with leaves in {F.his} hair]. They took the {o.m}, which was still {k!}, and crept out through the back, and when the thieves came to the hut {p.at} they found [a stale bun|~ <animal>, and it bit them]. The next morning they were caught, and {S} the {S.job}, whose {o!} it had been all along, [let the two friends keep it|gave them a new door for their hut].", TALES_WITH_FRIEND },

  { "[The Stray|A Dog Called Nobody|The {A.T} Collar|Whose Dog Is It?|{H} Finds a Dog]",
    "\n<later> a strange dog sat before the house. It was thin and wet, with one white [ear|paw|foot], and it wore ~ {A!} collar without a name. {H} gave it [bread and milk|the end of a sausage], and after that it [followed {H.him} like a shadow|slept across the doorstep]. They called it Nobody."
    "\n\"[It belongs to someone|Somebody is missing it],\" said {E}. {H} asked {p.at}, {q.at!} and {r.at}, but nobody knew the dog, and as the weeks went by {H} hoped that nobody would.",
    "\nThen two people came to the door on the same day. The first was {B} the {B.job}, in fine boots. \"That is my dog,\" {B.he} said, \"and I will have it back.\"\n\"What colour is its collar?\" asked {H}, who had [shut the dog in the kitchen|taken the collar off that morning to wash it].\n\"[Brown, I think,|Well, it is dark,|Who looks at collars?]\" said {B}, and [grew red|went away without another word]."
    "\nThe second was {S!} the {S.job}, with [dusty shoes|tired eyes]. \"I lost my dog in the spring, {q.at!},\" {S.he} said. \"I do not suppose... It had ~ {A!} collar. My [daughter|wife|sister] made it.\" Behind the kitchen door something began to bark and would not stop."
    "\nSo Nobody was somebody after all, and had a home in {s}. {H} [cried a little|said that it was quite all right, which it was not]. But the dog [looked back from the bend in the road|put both paws on {H.his} shoulders], and a year later {S} came again with a small, fat puppy, [with one white ear|wet-nosed and warm]. Round its neck was a collar: ~ {A!} one.", TALES_ALONE },

  { "[The Old Map|{n.T} Steps|Under the Ground|The Letter in the Wall|What the Letter Said]",
    "\nIn the wall of the kitchen, when a stone came loose, {H} found a letter. It was [yellow with age|so dry that it crackled]. \"[Whoever you are|To the one who reads this],\" it said, \"go to {p!}. Take {n!} steps towards the [rising|setting] sun and {N!} steps towards the hills, and dig. I have no children, and you are welcome to it. {S!} the {S.job}.\""
    "\n\"[A joke|Somebody's game],\" said {E}. But {H} showed it to <friend>, and {F} [whistled|read it twice]. They were going to dig at once; only, [the ground was hard as iron|there was the harvest to bring in|{H.his} spade was broken], and then {E} [lit the stove with the letter by mistake|washed the trousers with the letter in the pocket].",
    "\nWhen at last there was time to dig, the letter was long gone. \"{p.^at}, that much I know,\" said {F}, with the spade over {F.his} shoulder. \"But how many steps?\"\n<think>. {H.he} shut {H.his} eyes and saw the old ink again. \"{n.^!} towards the sun,\" {H.he} said, \"and {N!} towards the hills.\""
    "\nThey [paced it out|counted aloud] {p.at!}, and dug. [At first there were only worms|The first hole was empty, because {F} took such long steps]. Then the spade rang on iron. In the box lay [no gold|not a single coin], but ~ {o!}, and ~ {u!}, and a second letter: \"[I was happy here|These were dear to me]. Be so too. {S!} the {S.job}.\""
    "\n{H} kept the {o.s} and {F} kept the {u.s}, and [every year they put flowers on that spot|the box they filled again, with something of their own, and buried it {n} steps and {N} steps from the same place].", TALES_WITH_FRIEND },

  { "[The Great Wind|The {a.T}|A Sign of Storm|What Old {S} Knew|Nobody Believed {S}]",
    "\nThe oldest person in {t} was {S!}, who had been ~ {S.job} and now sat all day {p.at}. \"Mark my words,\" {S} said to {H} one morning. \"The day you see ~ {a!} asleep {q.at!} at noon, count {n!} days. On the last of them comes the great wind. It was so when I was a child.\""
    "\n\"[Old people talk|And when pigs fly, it rains bacon],\" said {F}, ~ {F.job} who was {H}'s friend. But {H} had a [good ear for such things|soft heart], and did not laugh.",
    "\nOne day at noon {H} came past {q}, and stood still. There it lay in the sun, ~ {a!}, fast asleep. The sky was [as blue as a plate|without a cloud].\n{H} <walked> home. \"In {n!} days the great wind will come,\" {H.he} told everybody. \"{S} said so.\" [Most people tapped their foreheads|Some laughed, and some went on with their work]. But {E} took down the shutters' bars from the loft, and {F}, [just to be kind|grumbling], helped to tie down the roof, and a few neighbours thought that [it could do no harm|a rope costs little]."
    "\nFor days nothing happened[, and the laughter grew louder|]. Then the {n!} days were over. At noon [the swallows vanished|the air turned yellow], by evening slates were flying, and all night long it [roared|howled] as if the valley were a flute."
    "\nIn the morning half the roofs of {t} were gone[, and the church had lost its weathercock|]. But [{E}'s house stood as before|those who had listened slept dry], and people came to {p}, where {S!} sat as always, and asked how anyone could have known. \"Ask {H},\" said {S}. \"{H} saw ~ {a!} asleep {q.at}, and can count to {n}. [The rest is weather|That is all the art].\"", TALES_WITH_FRIEND },
  { "[The Soup|Four Things in a Pot|What Goes Into the Soup|The Soup of {t}|{E}'s Soup]",
    "\nNobody in {t} cooked a soup like {E}'s. One evening {E.he} let {H} stand beside the stove. \"Four things go into it,\" {E.he} said, \"and the order is half of it. First {6!}. Then {7!}. Then {8!}, when the steam smells sweet. And last of all {9!}.\" \"[Why last|And if one forgot it]?\" asked {H}. \"[Try it the other way, and you will never ask again|Then it would be dishwater],\" said {E}. {H} repeated it under {H.his} breath, with a finger for each.",
    "\nThen came the great fair, with a prize of <number> silver coins for the best dish, and on the very morning {E} slipped on the ice-house steps and broke {E.his} wrist. \"[We shall stay at home|It does not matter],\" {E.he} said, in a voice that meant the opposite.\n\"I know it,\" said {H}. \"I stood beside you.\""
    "\n[{F}, {H}'s best friend, carried the pot to {p}, where the fires were|{F}, who was {H}'s friend, lit the fire {p.at}]. {H} shut {H.his} eyes and counted on {H.his} fingers. First {6!}. Then {7!}. When the steam smelled sweet, {8!}. \"[Is that all|It needs pepper],\" said {F}, looking over {H.his} shoulder. \"Wait,\" said {H}. \"Last of all {9!}.\""
    "\n{S} the {S.job}, who was the judge, ate one spoonful, [and then the whole bowl|and took off {S.his} hat], and asked for the recipe. \"Ask {E},\" said {H}. The prize {H.he} [laid in {E}'s good hand|brought home in the empty pot].", TALES_ALONE },
};
enum { TALES_PLOTS = sizeof tales_plots / sizeof tales_plots[0] };

static void tales_person_page(TalesStory *s, const char *page) {  // one interlude, with a person, a thing and a place of its own
  int mark = s->arena_used;
  tales_bind_person(s, 'M');
  tales_bind_thing(s, 'i');
  tales_bind(s, 'e', tales_places);
  tales_say(s, "\n");
  tales_say(s, page);
  s->slot['M'] = s->brief['M'] = s->slot['i'] = s->brief['i'] = s->slot['e'] = NULL;
  s->arena_used = mark;
}

static void tales_time_passes(TalesStory *s, int pages, int where) {
  const char *deck[32];
  int n = 0;
  if (where == TALES_ON_THE_ROAD) for (size_t i = 0; i < sizeof tales_roads / sizeof tales_roads[0]; i++) deck[n++] = tales_roads[i];
  else for (size_t i = 0; i < sizeof tales_days / sizeof tales_days[0]; i++) deck[n++] = tales_days[i];
  if (where == TALES_WITH_FRIEND) for (size_t i = 0; i < sizeof tales_friend_days / sizeof tales_friend_days[0]; i++) deck[n++] = tales_friend_days[i];
  for (int i = 0; i < pages && n > 0; i++) {  // drawn without putting back
    int k = tales_below(&s->rng, n);
    tales_person_page(s, deck[k]);
    deck[k] = deck[--n];
  }
}

static void tales_choose_threads(TalesStory *s, int n) {
  s->num_threads = 0;
  while (s->num_threads < n) {
    int k = tales_below(&s->rng, TALES_THREADS), known = 0;
    for (int i = 0; i < s->num_threads; i++) known |= s->threads[i] == k;
    if (known) continue;
    s->threads[s->num_threads++] = k;
    if (tales_threads[k].words) tales_bind_note(s, tales_threads[k].slot, tales_threads[k].words);
  }
}

static void tales_open(TalesStory *s) {
  tales_say(s, "\n[In the <village> of {t}, <lies>, lived ~ {H.job} named {H}|{H} was ~ {H.job} and lived in {t}, ~ <village> <lies>|There was once ~ {H.job} named {H}, in the <village> of {t}, <lies>]. "
               "{H.he} lived with {H.his} {E.job}, {E}, in a <house> house [near|not far from|just behind] {b}, and was [known to be <good>|<good> by nature|as <good> as anyone of that age].");
  for (int i = 0; i < s->num_threads; i++) tales_say(s, tales_threads[s->threads[i]].early);
  tales_say(s, "[\nIt was {V}. <weather>.|\nThis happened in {V}. <weather>.| It was {V}, and <weather>.]");
}

static void tales_close(TalesStory *s) {
  if (s->num_threads > 0) tales_say(s, "\n[So the day ended well|That evening it was quiet in the house|That was how it ended, and the rest is soon told|The stars came out over {t}].");
  for (int i = 0; i < s->num_threads; i++) tales_say(s, tales_threads[s->threads[i]].late);
  if (s->num_threads != 1) tales_say(s, "[\nAnd that is the end of it.|\nIn {t} they tell the story to this day.|\nAnd {H} slept well that night.|\n\"And now to bed,\" said {E}.|]");
  tales_word(s, TALES_SEPARATOR);
}

// ----------------------------------------------------------------------------
// Plots that need a little counting

static void tales_alias(TalesStory *s, char to, char from) {
  s->slot[(int)to] = s->slot[(int)from];
  s->brief[(int)to] = s->brief[(int)from];
  s->female[(int)to] = s->female[(int)from];
}

static void tales_plot_lost(TalesStory *s, int pages) {
  static const char places[] = "pqr";
  static const char *const deeds[] = { "climbed over a gate", "jumped across a ditch", "knelt down to drink", "crawled through a hedge", "bent down to tie a shoe", "picked a handful of berries" };
  static const char *const steps[] = { "\nFirst the way led to {K}, and there {H.he} {L}.", " Next came {K}, where {H.he} {L}.", " Then {H.he} {L} {K.at}." };
  int lost = tales_below(&s->rng, 3), first = tales_below(&s->rng, 6);
  tales_say(s, "[The Lost {o.T}|Where Is the {o.T}?|A Hole in the Pocket|An Errand to {s}|Three Places]");
  tales_open(s);
  tales_say(s, "\n<later> {E} gave {H} ~ {o!}. \"Take it to {S!} the {S.job} in {s},\" {E.he} said. \"[It has been mended for the last time, and now it goes home|It is a present|I borrowed it long ago]. [Do not dawdle|And hold on to it].\" {H} put it in {H.his} pocket and set off.");
  for (int i = 0; i < 3; i++) {
    tales_alias(s, 'K', places[i]);
    s->slot['L'] = deeds[(first + i) % 6];
    tales_say(s, steps[i]);
    if (i == lost) tales_say(s, " [Something chinked behind {H.him}, but {H.he} did not look round|There was a small bright sound, like a bird's, and {H.he} thought no more of it|Something touched {H.his} foot, and {H.he} took it for a pebble].");
  }
  tales_time_passes(s, pages, TALES_ON_THE_ROAD);
  tales_say(s, "\nIn {s} {S!} the {S.job} came to the door. {H} reached into {H.his} pocket, and [there was a hole in it, as big as a walnut|three fingers came out at the bottom]. The {o.s} was gone. \"[Things do not fly away|Do not cry],\" said {S}. \"Go back the way you came, [and look with your feet as well as your eyes|and think at every place what you did there].\"");
  for (int i = 2; i >= lost; i--) {
    tales_alias(s, 'K', places[i]);
    s->slot['L'] = deeds[(first + i) % 6];
    if (i > lost) tales_say(s, i == 2 ? "\nSo back {H.he} went. {K.at}, where {H.he} had {L}, {H.he} [searched every blade of grass|looked under every leaf]: <nothing>." : " {H.he} went on to {K}, where {H.he} had {L}: <nothing>.");
    else tales_say(s, "\nThen {H.he} came to {K}, where {H.he} had {L}, and [remembered something|stopped as if somebody had called]. And there it lay, ~ {o!}, [winking in the sun|half under a dock leaf|with a snail beside it].");
  }
  tales_say(s, "\nThis time {H} carried it in {H.his} hand, all the way. {S} the {S.job} [gave {H.him} a bowl of soup, and a needle to mend the pocket|was so <glad> that {S.he} walked half the way home with {H.him}].");
}

static void tales_plot_trade(TalesStory *s, int pages) {
  static const char people[] = "1234", things[] = "o6789", places[] = "pqrK";
  static const char *const steps[] = {
    "\n{K.at} {H.he} met {I} the {I.job}, who [sighed|was turning out all {I.his} pockets]. \"If only I had ~ {U.s},\" said {I}. [\"For a good one I would give this {V.s}.\"|\"I have this {V.s}, and no use for it.\"] They [shook hands|looked each other in the eye], and the {U.m} and ~ {V!} changed owners.",
    "\n{I}, ~ {I.job}, was sitting {K.at} with ~ {V!}. \"What is that you have there? ~ {U.s}?\" {I} called out. [One word led to another|They talked for an hour about the weather, and for a minute about the trade], and {H} went on with the {V.m}.",
    "\n{K.at} {H} came upon {I} the {I.job}, whose [child|mother|sister] was ill and wished for nothing but ~ {U.s}. {H} did not bargain. \"[Take it|It is yours],\" {H.he} said. But {I} would not hear of a present, and gave {H.him} ~ {V!} for it." };
  int trades = 2 + tales_below(&s->rng, 3);
  tales_bind(s, 'K', tales_places);
  for (int i = 0; i < trades; i++) {
    tales_bind_person(s, people[i]);
    tales_bind_thing(s, things[i + 1]);
  }
  tales_alias(s, 'L', things[trades]);
  const char *place[4];
  for (int i = 0; i < 4; i++) place[i] = s->slot[(int)places[i]];
  tales_say(s, "[A Good Trade|One Thing for Another|From {o.T} to {L.T}|The Trader|{H} Goes Trading]");
  tales_open(s);
  tales_say(s, "\n{H} owned one thing of any worth: ~ {o!}. And {H.he} wanted one thing more than any other: ~ {L.m}, such as {H.he} had once seen in [a window|a picture] in {s}. \"[Then you must trade|Nobody will give it to you],\" said {E}. \"[But do it honestly|Only never trade with a heavy heart].\" So {H} set out.");
  for (int i = 0; i < trades; i++) {
    tales_alias(s, 'I', people[i]);
    tales_alias(s, 'U', things[i]);
    tales_alias(s, 'V', things[i + 1]);
    s->slot['K'] = place[i];
    tales_say(s, steps[tales_below(&s->rng, 3)]);
    if (i == 0 || pages > 4) tales_time_passes(s, pages > 4 ? pages / trades : pages, TALES_ON_THE_ROAD);
  }
  tales_say(s, "\n[At home|Late that evening] {H} put the {L.m} on the table. \"And how did you come by that?\" asked {E}, and [looked over {E.his} spectacles|put down {E.his} spoon].\n\"");
  for (int i = 0; i < trades; i++) {
    tales_alias(s, 'I', people[i]);
    tales_alias(s, 'U', things[i]);
    tales_alias(s, 'V', things[i + 1]);
    tales_say(s, i == 0 ? "For the {U!} I had ~ {V!} from {I}" : i + 1 < trades ? ", and for the {U.s} ~ {V!} from {I}" : ", and for the {U.s} I had this from {I}");
  }
  tales_say(s, ",\" said {H}. \"[And everyone was <glad>|Nobody was cheated].\"");
}

static void tales_plot_journey(TalesStory *s, int pages) {
  static const char *const gifts[][3] = {  // the gift, how it is given, what it is good for
    { "a ball of string", "It is not much, but it is long", "In the hills a bridge had lost its handrail, and the wind was strong enough to throw a horse. {H} tied {L} from post to post and held on to it: {L}, from {I} {K.at}." },
    { "a candle end", "Small lights are still lights", "The road went into the mountain, through a tunnel as black as a boot. {H} lit {L} that {I} had given {H.him} {K.at}, and it burned just long enough." },
    { "a dry crust", "Somebody will be glad of it", "At a lonely farm a huge dog barred the way and showed its teeth. {H} threw it {L} that {I} had given {H.him} {K.at}, and the dog lay down and chewed." },
    { "a pinch of salt", "No soup is too good for it", "Robbers caught {H.him} in the wood, but they were cooking, and the soup tasted of nothing. {H} gave them {L} that had come from {I} {K.at}, and they let {H.him} go with a blessing." },
    { "a fish bone comb", "For tangles of every kind", "Under a willow sat a giantess, weeping, with her hair caught in the branches. It took an hour to free her with {L} that {I} had given {H.him} {K.at}, and then she carried {H.him} over the river." },
    { "a red thread", "Red can be seen from far away", "In the marsh all the paths looked the same. {H} tied bits of {L} to the reeds, the gift of {I} {K.at}, and so never walked in a circle." },
    { "a tin cup", "You will be thirsty one day", "On the moor a well was deep and had no bucket. {H} let down {L} that {I} had given {H.him} {K.at}, on two bootlaces, and drank until the stars came out." },
    { "a goose quill", "Whoever can write is never alone", "At the border a clerk would let nobody pass, for he had broken his pen. {H} lent him {L} that {I} had given {H.him} {K.at}, and the gate went up." },
  };
  static const char people[] = "123", places[] = "pqr";
  int gift[3], order[3] = { 0, 1, 2 };
  for (int i = 0; i < 3; i++) {
    tales_bind_person(s, people[i]);
    do gift[i] = tales_below(&s->rng, 8); while ((i > 0 && gift[i] == gift[0]) || (i > 1 && gift[i] == gift[1]));
  }
  for (int i = 2; i > 0; i--) {  // the gifts are needed in another order
    int j = tales_below(&s->rng, i + 1), k = order[i];
    order[i] = order[j];
    order[j] = k;
  }
  tales_say(s, "[The Road to {s}|Three Gifts|{H} Goes to {s}|The Long Way|What {H} Carried]");
  tales_open(s);
  tales_say(s, "\nIn {s}, <number> days away, lived {S!} the {S.job}, {E}'s oldest friend, and the time had come to bring {S.him} ~ {o!} that {E} had kept for {S.him} all those years. \"[My legs will not do it any more|I am too old for the road],\" said {E}. \"[You must go, {H}.|Will you go, {H}?]\"\n\"[Tomorrow|Yes],\" said {H}, and packed bread and ~ [knife|blanket|extra shirt].");
  for (int i = 0; i < 3; i++) {
    static const char *const meetings[] = {
      "\n{K.at} stood {I} the {I.job} and pressed something into {H.his} hand: {L}. \"{J},\" {I} said.",
      " [A little later|An hour on], {K.at}, {I} the {I.job} called {H.him} over and gave {H.him} {L}. \"{J},\" {I.he} said.",
      " And {K.at} there was {I} the {I.job}, who would not let {H.him} pass without {L}. \"{J},\" said {I}." };
    tales_alias(s, 'I', people[i]);
    tales_alias(s, 'K', places[i]);
    s->slot['L'] = gifts[gift[i]][0];
    s->slot['J'] = gifts[gift[i]][1];
    tales_say(s, meetings[i]);
  }
  tales_say(s, " {H} thanked them all, and [wondered|asked {H.himself}] what such things could be good for.");
  for (int i = 0; i < 3; i++) {
    char the[64];
    tales_time_passes(s, pages / 3 + (i < pages % 3), TALES_ON_THE_ROAD);
    tales_alias(s, 'I', people[order[i]]);
    tales_alias(s, 'K', places[order[i]]);
    snprintf(the, sizeof the, "the %s", strchr(gifts[gift[order[i]]][0], ' ') + 1);
    s->slot['L'] = tales_keep(s, the, (int)strlen(the));
    tales_say(s, "\n");
    tales_say(s, gifts[gift[order[i]]][2]);
  }
  tales_say(s, "\nSo {H} came to {s}, and found {S!} the {S.job}, and unwrapped ~ {o!}. {S} [kissed it|had to sit down]. \"[How did you ever get through|Such a road, all alone]?\" {S.he} asked.\n"
               "\"I was not alone,\" said {H}. \"I had {1} with me, and {2}, and {3}.\" [{H} told {S.him} everything|{S} understood when {S.he} had heard the whole story]. After a week of rest {H} took the same road home.");
}

// ----------------------------------------------------------------------------
// A story

static void tales_cast(TalesStory *s) {
  static const char *const seasons[] = { "spring", "summer", "autumn", "winter" };
  s->season = s->slot['V'] = seasons[tales_below(&s->rng, 4)];
  tales_bind_young(s, 'H');
  tales_bind_young(s, 'F');
  tales_bind_person(s, 'E');
  s->brief['E'] = s->female['E'] ? "[grandmother|aunt|great-aunt]" : "[grandfather|uncle|great-uncle]";
  s->brief['E'] = tales_note(s, s->brief['E']);
  tales_bind_person(s, 'S');
  tales_bind_person(s, 'B');
  tales_bind_person(s, 'X');
  for (const char *slot = "ou"; *slot; slot++) tales_bind_thing(s, *slot);
  for (const char *slot = "pqrb"; *slot; slot++) tales_bind(s, *slot, tales_places);
  for (const char *slot = "klh"; *slot; slot++) tales_bind(s, *slot, tales_hides);
  for (const char *slot = "AC"; *slot; slot++) tales_bind(s, *slot, tales_colours);
  for (const char *slot = "nN"; *slot; slot++) tales_bind(s, *slot, tales_numbers);
  for (const char *slot = "6789"; *slot; slot++) tales_bind(s, *slot, tales_ingredients);
  tales_bind_person(s, 'd');
  tales_bind(s, 'd', tales_pets);
  s->brief['d'] = tales_fresh(s, "dog|cat|terrier|sheepdog|goat|jackdaw");
  tales_bind_town(s, 't');
  tales_bind_town(s, 's');
  tales_bind(s, 'a', tales_animals);
  tales_bind_note(s, 'f', "<food>");
  tales_bind_note(s, 'x', "[the price of <number> rolls|<number> eggs|<number> copper coins|a day's work|a sack of potatoes|<number> candles]");
  tales_bind_note(s, 'J', "a [basket|sack|bundle] of [firewood|bread|turnips|dry peat]");
  tales_bind_note(s, 'Y', "[the elves|a rich cousin|the mayor|the miller's wife]");
  tales_bind_note(s, 'w', "<colour> <animal>");
  tales_bind_note(s, 'm', "[the|my|our] <colour> <animal> [sleeps|waits|sits|sings|has built its nest] <hide> [until|before|after] [the first snow|midnight|harvest time|the bells are silent|the ice breaks|the swallows leave]");
}

// Tell one story behind what is in s->out. A long one takes many pages from early to late.
static void tales_tell(TalesStory *s, uint64_t seed, uint64_t index) {
  s->rng = tales_stream(seed, index);
  s->arena_used = s->capital = s->article = s->num_facts = 0;
  memset(s->slot, 0, sizeof s->slot);
  memset(s->brief, 0, sizeof s->brief);
  tales_cast(s);
  int is_long = tales_below(&s->rng, 20) == 0;
  int pages = is_long ? 8 + tales_below(&s->rng, 7) : tales_below(&s->rng, 3);
  tales_choose_threads(s, is_long ? 4 : tales_below(&s->rng, 3));
  int plot = tales_below(&s->rng, TALES_PLOTS + 3);
  if (plot == TALES_PLOTS) tales_plot_lost(s, pages);
  else if (plot == TALES_PLOTS + 1) tales_plot_trade(s, pages);
  else if (plot == TALES_PLOTS + 2) tales_plot_journey(s, pages);
  else {
    const TalesPlot *p = &tales_plots[plot];
    tales_say(s, p->title);
    tales_open(s);
    tales_say(s, p->early);
    tales_time_passes(s, pages, p->where);
    tales_say(s, p->late);
  }
  tales_close(s);
}

// Stories of about `bytes` bytes in all (the last one is whole), NUL-terminated behind *len; NULL when memory
// ran out. The caller frees it.
char *tales_make(uint64_t seed, int64_t bytes, int64_t *len) {
  TalesStory *s = (TalesStory *)calloc(1, sizeof *s);
  TalesText out = { NULL, 0, 0, 0 };
  if (!s) return NULL;
  s->out = &out;
  for (uint64_t i = 0; i == 0 || (out.len < bytes && !out.failed); i++) tales_tell(s, seed, i);
  free(s);
  if (out.failed) {
    free(out.text);
    return NULL;
  }
  out.text[out.len] = 0;  // tales_put keeps room for it
  *len = out.len;
  return out.text;
}

#ifndef TALES_NO_MAIN
// ----------------------------------------------------------------------------
// Long-range tasks: facts between the paragraphs of a long text, questions at its end

static const char *tales_path = "standard output";

static void tales_die(int code, const char *what, const char *why) {
  fprintf(stderr, "tales: %s%s\n", what, why);
  exit(code);
}

static void tales_check(const TalesText *out) {
  if (out->failed) tales_die(1, "out of memory", "");
}

static void tales_add(TalesText *out, const char *text) { tales_append(out, text, (int64_t)strlen(text)); }

static void tales_add_number(TalesText *out, const char *before, int64_t number) {
  char digits[32];
  snprintf(digits, sizeof digits, "%lld", (long long)number);
  tales_add(out, before);
  tales_add(out, digits);
}

static void tales_add_json(TalesText *out, const char *before, const char *text, int64_t n) {  // before, then the quoted text
  tales_add(out, before);
  tales_put(out, '"');
  for (; n > 0; n--, text++) {
    if (*text == '\n') tales_add(out, "\\n");
    else {
      if (*text == '"' || *text == '\\') tales_put(out, '\\');
      tales_put(out, *text);
    }
  }
  tales_put(out, '"');
}

typedef struct {
  char fact[256], question[256], answer[96];
  double depth;     // where it is wanted, 0 to 1
  int64_t offset;   // where it came to stand
  int key;
} TalesNeedle;

static int tales_by_depth(const void *a, const void *b) {
  double x = ((const TalesNeedle *)a)->depth, y = ((const TalesNeedle *)b)->depth;
  return x < y ? -1 : x > y;
}

// Exactly `length` bytes: the end of a long row of stories with each needle (sorted by depth) as a paragraph of its own
// between two others, as near to its depth as paragraphs allow. Returns 0 where there is no room.
static int tales_hay(TalesText *out, uint64_t seed, int64_t length, TalesNeedle *needles, int n) {
  int64_t hay_len, rest = length, separator = (int64_t)strlen(TALES_SEPARATOR);
  for (int i = 0; i < n; i++) rest -= (int64_t)strlen(needles[i].fact) + 2;
  if (rest < length / 4) return 0;
  char *hay = tales_make(seed, rest + separator, &hay_len);
  if (!hay) tales_die(1, "out of memory", "");
  const char *text = hay + hay_len - separator - rest;
  int64_t done = 0, from = out->len;
  for (int i = 0; i < n; i++) {
    int64_t want = (int64_t)(needles[i].depth * (double)rest), before = want, behind = want;
    while (before > 0 && !(before > 1 && text[before - 1] == '\n' && text[before - 2] == '\n')) before--;
    while (behind < rest && !(behind > 1 && text[behind - 1] == '\n' && text[behind - 2] == '\n')) behind++;
    int64_t at = want - before <= behind - want ? before : behind;
    if (at < done) at = done;
    tales_append(out, text + done, at - done);
    if (at == rest) tales_add(out, "\n\n");
    needles[i].offset = out->len - from;
    tales_add(out, needles[i].fact);
    if (at < rest) tales_add(out, "\n\n");
    done = at;
  }
  tales_append(out, text + done, rest - done);
  free(hay);
  return 1;
}

static void tales_copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void tales_make_needle(TalesStory *s, TalesNeedle *needle) {
  static const char *const forms[][3] = {
    { "The secret number of the {1} in {t} is {0}.", "What is the secret number of the {1} in {t}?", "{0}" },
    { "The golden seal of {t} is kept {k}.", "Where is the golden seal of {t} kept?", "{k}" },
    { "The watchword of the guards of {t} is '{w}'.", "What is the watchword of the guards of {t}?", "{w}" },
    { "The only one who knows the way through the {t} marshes is {S} the {S.job}.", "Who knows the way through the {t} marshes?", "{S} the {S.job}" } };
  int form = tales_below(&s->rng, 4);
  char number[16];
  snprintf(number, sizeof number, "%d", 10000 + tales_below(&s->rng, 90000));
  s->slot['0'] = tales_keep(s, number, (int)strlen(number));
  tales_bind_note(s, '1', "[lighthouse|clock tower|town hall|granary]");
  tales_copy(needle->fact, sizeof needle->fact, tales_note(s, forms[form][0]));
  tales_copy(needle->question, sizeof needle->question, tales_note(s, forms[form][1]));
  tales_copy(needle->answer, sizeof needle->answer, tales_note(s, forms[form][2]));
}

static void tales_make_pair(TalesStory *s, TalesNeedle *all, int i) {  // "The number of the small red fox is 4821.", no two alike
  for (int fresh = 0; !fresh;) {
    const char *pick_end, *end, *lists[3] = { tales_looks, tales_colours, tales_animals };
    char key[80] = "";
    for (int j = 0; j < 3; j++) {
      const char *pick = tales_pick(&s->rng, lists[j], &pick_end, &end);
      size_t used = strlen(key);
      snprintf(key + used, sizeof key - used, " %.*s", (int)(pick_end - pick), pick);
    }
    snprintf(all[i].question, sizeof all[i].question, "What is the number of the%s?", key);
    fresh = 1;
    for (int j = 0; j < i && fresh; j++) fresh = strcmp(all[j].question, all[i].question) != 0;
    snprintf(all[i].answer, sizeof all[i].answer, "%d", 1000 + tales_below(&s->rng, 9000));
    snprintf(all[i].fact, sizeof all[i].fact, "The number of the%s is %s.", key, all[i].answer);
  }
  all[i].depth = (double)tales_below(&s->rng, 1 << 20) / (1 << 20);
}

static void tales_write(FILE *file, TalesText *out) {
  tales_check(out);
  if (fwrite(out->text, 1, (size_t)out->len, file) != (size_t)out->len) {
    fprintf(stderr, "tales: cannot write %s: %s\n", tales_path, strerror(errno));
    exit(1);
  }
  out->len = 0;
}

// A line of JSON for one needle (question, answer, depth, needle_offset) or for many (queries, a list of the same).
static void tales_task_line(TalesText *line, const TalesText *text, const TalesNeedle *asked, int n, int is_recall, int pairs) {
  tales_add(line, is_recall ? "{\"task\": \"recall\"" : "{\"task\": \"needle\"");
  tales_add_json(line, ", \"text\": ", text->text, text->len);
  if (is_recall) tales_add_number(line, ", \"pairs\": ", pairs);
  for (int i = 0; i < n; i++) {
    char depth[32];
    snprintf(depth, sizeof depth, ", \"depth\": %.4f", (double)asked[i].offset / (double)text->len);
    if (is_recall) tales_add(line, i == 0 ? ", \"queries\": [{" : ", {");
    tales_add_json(line, is_recall ? "\"question\": " : ", \"question\": ", asked[i].question, (int64_t)strlen(asked[i].question));
    tales_add_json(line, ", \"answer\": ", asked[i].answer, (int64_t)strlen(asked[i].answer));
    tales_add(line, depth);
    tales_add_number(line, ", \"needle_offset\": ", asked[i].offset);
    if (is_recall) tales_add(line, "}");
  }
  tales_add(line, is_recall ? "]}\n" : "}\n");
}

static void tales_run_task(FILE *file, int is_recall, uint64_t seed, int64_t length, double depth, int64_t count, int queries, int pairs, int as_text) {
  int n = is_recall ? pairs : 1;
  TalesNeedle *all = (TalesNeedle *)calloc((size_t)n, sizeof *all);
  TalesStory *s = (TalesStory *)calloc(1, sizeof *s);
  TalesText text = { NULL, 0, 0, 0 }, line = { NULL, 0, 0, 0 };
  if (!all || !s) tales_die(1, "out of memory", "");
  for (int64_t item = 0; item < count; item++) {
    text.len = line.len = 0;
    s->out = &line;
    s->rng = tales_stream(seed ^ 0x6E6565646C65u, (uint64_t)item);
    s->arena_used = 0;
    memset(s->slot, 0, sizeof s->slot);
    memset(s->brief, 0, sizeof s->brief);
    if (is_recall) for (int i = 0; i < n; i++) tales_make_pair(s, all, i);
    else {
      tales_cast(s);
      tales_make_needle(s, all);
      all[0].depth = depth >= 0 ? depth : (double)tales_below(&s->rng, 1001) / 1000;
    }
    qsort(all, (size_t)n, sizeof *all, tales_by_depth);
    if (!tales_hay(&text, tales_next(&s->rng), length, all, n))
      tales_die(2, is_recall ? "--length is too short for so many --pairs" : "--length is too short", ": the facts would fill more than three quarters of it");
    for (int i = 0; is_recall && i < queries; i++) {  // ask about `queries` of them, in any order
      int j = i + tales_below(&s->rng, n - i);
      TalesNeedle swap = all[i];
      all[i] = all[j];
      all[j] = swap;
    }
    if (as_text) {
      tales_append(&line, text.text, text.len);
      tales_add(&line, "\n\n");
      for (int i = 0; i < queries; i++) {
        tales_add(&line, i ? "\nQuestion: " : "Question: ");
        tales_add(&line, all[i].question);
        tales_add(&line, "\nAnswer: ");
        tales_add(&line, all[i].answer);
      }
      tales_add(&line, TALES_SEPARATOR);
    } else tales_task_line(&line, &text, all, queries, is_recall, pairs);
    tales_check(&text);
    tales_write(file, &line);
  }
  free(all);
  free(s);
  free(text.text);
  free(line.text);
}

// ----------------------------------------------------------------------------
// Stories to a file

static int tales_same(const char *a, const char *b, int n) {  // but for the case of the letters
  for (int i = 0; i < n; i++) if (tolower((unsigned char)a[i]) != tolower((unsigned char)b[i])) return 0;
  return 1;
}

// One story as a line of JSON with its facts: the words, and the first and the last place where they stand.
static void tales_facts_line(TalesText *line, const TalesStory *s) {
  static const char names[][14] = { "kplace", "Kplace", "pplace", "qplace", "rplace", "othing", "uthing", "Uthing", "Vthing", "nnumber", "Nnumber", "mmessage", "wpassword", "Acolour",
    "Ccolour", "aanimal", "ccoat", "dpet", "Psaying", "zpromise", "ycharm", "Dweekday", "ffood", "jcups", "xdebt", "gdoor", "Ttune", "6ingredient", "7ingredient", "8ingredient", "9ingredient" };
  const char *text = s->out->text;
  int64_t len = s->out->len - (int64_t)strlen(TALES_SEPARATOR);
  int n = 0;
  tales_add_json(line, "{\"title\": ", text, (int64_t)strcspn(text, "\n"));
  tales_add_json(line, ", \"text\": ", text, len);
  tales_add(line, ", \"facts\": [");
  for (int i = 0; i < s->num_facts; i++) {
    const TalesFact *f = &s->facts[i];
    int64_t last = f->at;
    int told = 0;
    for (int j = 0; j < s->num_facts; j++) {
      if (s->facts[j].len != f->len || !tales_same(text + s->facts[j].at, text + f->at, f->len)) continue;
      if (j < i) told = 1;
      else last = s->facts[j].at;
    }
    if (told || last == f->at) continue;
    const char *name = "person";
    for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) if (names[k][0] == f->slot) name = names[k] + 1;
    tales_add(line, n++ ? ", {\"kind\": \"" : "{\"kind\": \"");
    tales_add(line, name);
    tales_add_json(line, "\", \"words\": ", text + f->at, f->len);
    tales_add_number(line, ", \"first\": ", f->at);
    tales_add_number(line, ", \"last\": ", last);
    tales_add(line, "}");
  }
  tales_add(line, "]}\n");
}

static void tales_run_stories(FILE *file, uint64_t seed, int64_t bytes, int with_facts) {
  TalesStory *s = (TalesStory *)calloc(1, sizeof *s);
  TalesText out = { NULL, 0, 0, 0 }, line = { NULL, 0, 0, 0 };
  if (!s) tales_die(1, "out of memory", "");
  s->out = &out;
  int64_t done = 0;
  for (uint64_t i = 0; i == 0 || done < bytes; i++) {
    out.len = 0;
    tales_tell(s, seed, i);
    tales_check(&out);
    done += out.len;
    if (with_facts) tales_facts_line(&line, s);
    tales_write(file, with_facts ? &line : &out);
  }
  free(s);
  free(out.text);
  free(line.text);
}

// ----------------------------------------------------------------------------
// Command line

static const char tales_help[] =
  "tales: plain English stories from a seed, and long-range tasks made of them\n"
  "\n"
  "  tales [--bytes 6M] [--seed 1] [-o FILE]                    stories\n"
  "  tales --task needle --length 8192 --depth 0.35 --count 10  one fact in a long text, one question\n"
  "  tales --task recall --length 8192 --queries 8 --count 10   many facts in a long text, several questions\n"
  "\n"
  "  --bytes N      how much text; the last story is whole (default 1M; K, M, G are powers of 1024)\n"
  "  --seed N       same seed, same bytes (default 1)\n"
  "  -o, --out F    write to F (default: standard output)\n"
  "  --facts        stories as JSON lines: title, text, and the facts told early and needed again late\n"
  "  --task T       needle or recall: one JSON object a line\n"
  "  --length N     bytes of the text that the questions are about (default 8192)\n"
  "  --depth X      where the needle lies: 0 beginning, 1 end (default: anywhere)\n"
  "  --count N      how many texts (default 1)\n"
  "  --queries N    recall: questions behind each text (default 8)\n"
  "  --pairs N      recall: facts in each text (default twice the queries)\n"
  "  --format F     jsonl, or text: plain text to train on, with questions and answers behind it\n"
  "  --help         this page\n";

static int64_t tales_size(const char *option, const char *value, int64_t least, int64_t most) {
  char *end;
  errno = 0;
  long long n = strtoll(value, &end, 10);
  int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
  if (shift) end++;
  if (end == value || *end || errno || !(isdigit((unsigned char)*value)) || n > (most >> shift) || (n << shift) < least) {
    fprintf(stderr, "tales: %s wants a whole number from %lld to %lld, such as 6M; got '%s'\n", option, (long long)least, (long long)most, value);
    exit(2);
  }
  return (int64_t)n << shift;
}

int main(int argc, char **argv) {
  enum { BYTES, SEED, OUT, SHORT_OUT, FACTS, TASK, LENGTH, DEPTH, COUNT, QUERIES, PAIRS, FORMAT, HELP, OPTIONS };
  static const char *const names[OPTIONS] = { "--bytes", "--seed", "--out", "-o", "--facts", "--task", "--length", "--depth", "--count", "--queries", "--pairs", "--format", "--help" };
  const char *value[OPTIONS] = { NULL };
  for (int i = 1; i < argc; i++) {
    int k = 0;
    while (k < OPTIONS && strcmp(argv[i], names[k])) k++;
    if (k == OPTIONS) tales_die(2, "unknown option, see --help: ", argv[i]);
    if (k == FACTS || k == HELP) value[k] = "";
    else if (i + 1 == argc) tales_die(2, "a value is missing behind ", argv[i]);
    else value[k] = argv[++i];
  }
  if (value[SHORT_OUT]) value[OUT] = value[SHORT_OUT];
  if (value[HELP]) {
    fputs(tales_help, stdout);
    return 0;
  }
  int is_recall = value[TASK] && !strcmp(value[TASK], "recall");
  if (value[TASK] && !is_recall && strcmp(value[TASK], "needle")) tales_die(2, "--task is needle or recall, not ", value[TASK]);
  for (int k = LENGTH; k <= FORMAT; k++) if (value[k] && !value[TASK]) tales_die(2, "only with --task: ", names[k]);
  if (value[TASK] && (value[BYTES] || value[FACTS])) tales_die(2, "not with --task: ", value[BYTES] ? "--bytes (use --length)" : "--facts");
  if (is_recall && value[DEPTH]) tales_die(2, "only with --task needle: ", "--depth");
  if (!is_recall && (value[QUERIES] || value[PAIRS])) tales_die(2, "only with --task recall: ", value[QUERIES] ? "--queries" : "--pairs");
  uint64_t seed = value[SEED] ? (uint64_t)tales_size("--seed", value[SEED], 0, INT64_MAX) : 1;
  int64_t bytes = value[BYTES] ? tales_size("--bytes", value[BYTES], 1, INT64_MAX) : 1 << 20;
  int64_t length = value[LENGTH] ? tales_size("--length", value[LENGTH], 256, (int64_t)1 << 40) : 8192;
  int64_t count = value[COUNT] ? tales_size("--count", value[COUNT], 1, INT64_MAX) : 1;
  int queries = !is_recall ? 1 : value[QUERIES] ? (int)tales_size("--queries", value[QUERIES], 1, 1024) : 8;
  int pairs = value[PAIRS] ? (int)tales_size("--pairs", value[PAIRS], 1, 4096) : 2 * queries;
  if (is_recall && queries > pairs) tales_die(2, "--queries cannot be more than --pairs", "");
  int as_text = value[FORMAT] && !strcmp(value[FORMAT], "text");
  if (value[FORMAT] && !as_text && strcmp(value[FORMAT], "jsonl")) tales_die(2, "--format is jsonl or text, not ", value[FORMAT]);
  double depth = -1;
  if (value[DEPTH]) {
    char *end;
    depth = strtod(value[DEPTH], &end);
    if (end == value[DEPTH] || *end || !(depth >= 0 && depth <= 1)) tales_die(2, "--depth is a number from 0 to 1, not ", value[DEPTH]);
  }

  FILE *file = stdout;
  if (value[OUT]) {
    tales_path = value[OUT];
    file = fopen(tales_path, "wb");
    if (!file) {
      fprintf(stderr, "tales: cannot open %s: %s\n", tales_path, strerror(errno));
      return 1;
    }
  }
  if (value[TASK]) tales_run_task(file, is_recall, seed, length, depth, count, queries, pairs, as_text);
  else tales_run_stories(file, seed, bytes, value[FACTS] != NULL);
  if (fflush(file) || fclose(file)) {  // a full disk may show only here
    fprintf(stderr, "tales: cannot write %s: %s\n", tales_path, strerror(errno));
    return 1;
  }
  return 0;
}
#endif
