# What the compressors that come with the package have learned from, for the two scripts that make them.
texts=(
    --text-license "bible=public domain"
    --text-license "code=PSF-2.0 (CPython), BSD-3-Clause (torch)"
    --text-license "dialogue=MIT"
    --text-license "drama=public domain, from Project Gutenberg"
    --text-license "fiction=public domain"
    --text-license "nonfiction=GPL-2.0"
    --text-license "techdoc=PSF-2.0, GPL-1.0-or-later or Artistic, PostgreSQL, GPL-2.0"
    --text-license "wiki=CC-BY-SA (Wikipedia)"
)
for name in bible code dialogue drama fiction nonfiction techdoc wiki; do
    texts+=(--text "corpus/train/$name.txt")
done
