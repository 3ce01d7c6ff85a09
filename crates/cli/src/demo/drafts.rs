//! How often the MTP layer's second token would be accepted.

use super::text::percent;
use hadal_train::Drafts;
use serde::Serialize;

/// Acceptance on what the model wrote, and along held-out text.
#[derive(Serialize)]
pub struct Acceptance {
    /// By kind of text that the model wrote greedily.
    written: Vec<Group>,
    /// All of these together: accepted over drafted.
    rate: f64,
    /// Tokens for each pass of the main model, if decoding used the guesses: 1 + `rate`.
    tokens_per_pass: f64,
    /// Along held-out text: guesses that are the main model's choice after the text's own tokens.
    held_out: Group,
    /// Along held-out text: guesses that are the text's token.
    held_out_right: usize,
}

#[derive(Serialize)]
struct Group {
    text: &'static str,
    drafted: usize,
    accepted: usize,
}

impl Acceptance {
    /// From the guesses in each written text, by its kind, and those along held-out text.
    pub fn of(written: impl Iterator<Item = (&'static str, Drafts)>, held: &[Drafts]) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (text, d) in written {
            match groups.iter_mut().find(|g| g.text == text) {
                Some(g) => (g.drafted, g.accepted) = (g.drafted + d.drafted, g.accepted + d.as_text),
                None => groups.push(Group { text, drafted: d.drafted, accepted: d.as_text }),
            }
        }
        let mut all = Drafts::default();
        held.iter().for_each(|&d| all.add(d));
        let drafted: usize = groups.iter().map(|g| g.drafted).sum();
        let accepted: usize = groups.iter().map(|g| g.accepted).sum();
        let rate = percent(accepted, drafted) / 100.0;
        Self {
            written: groups,
            rate,
            tokens_per_pass: 1.0 + rate,
            held_out: Group { text: "held-out text", drafted: all.drafted, accepted: all.as_model },
            held_out_right: all.as_text,
        }
    }

    /// The table and what would follow.
    pub fn text(&self) -> String {
        let mut s =
            "\nMTP: how often its second token is the one that the main model goes on to choose\n\n".to_string();
        for g in self.written.iter().chain([&self.held_out]) {
            if g.drafted == 0 {
                s += &format!("  {:<16}  nothing to judge: it ended at once\n", g.text);
                continue;
            }
            let rate = percent(g.accepted, g.drafted);
            s += &format!("  {:<16} {rate:>5.1} %  ({} of {})\n", g.text, g.accepted, g.drafted);
        }
        let right = percent(self.held_out_right, self.held_out.drafted);
        s + &format!(
            "\n  Held-out text is read as it stands ({right:.1} % of the guesses there are its own next token); the rest\n  \
             the model wrote itself, greedily. Speculation on such text would make {:.2} tokens of each pass of the\n  \
             main model; decoding does not speculate yet.\n",
            self.tokens_per_pass
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_text_counts_against_itself_and_held_out_against_the_model() {
        let d = |drafted, as_text, as_model| Drafts { drafted, as_text, as_model };
        let written = [("a", d(10, 5, 6)), ("b", d(4, 4, 4)), ("a", d(6, 1, 1))];
        let a = Acceptance::of(written.into_iter(), &[d(8, 2, 4), d(2, 1, 2)]);
        let groups: Vec<_> = a.written.iter().map(|g| (g.text, g.drafted, g.accepted)).collect();
        assert_eq!(groups, [("a", 16, 6), ("b", 4, 4)]);
        assert_eq!((a.rate, a.tokens_per_pass), (0.5, 1.5));
        assert_eq!((a.held_out.accepted, a.held_out.drafted, a.held_out_right), (6, 10, 3));
        assert_eq!(Acceptance::of([].into_iter(), &[]).rate, 0.0);
    }
}
