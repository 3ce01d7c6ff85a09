//! Worked arithmetic, scored: problems that no corpus holds, answered greedily.

use super::text::{bar, indented};
use hadal_data::corpus::builtin::Problem;
use serde::Serialize;

/// Columns of a bar.
const WIDTH: usize = 20;
/// Most lines of a problem's working that are printed.
const LINES: usize = 12;

/// The score.
#[derive(Default, Serialize)]
pub struct Arithmetic {
    problems: usize,
    solved: usize,
    /// Problems that the model's positions do not hold; they count as not solved.
    too_long: usize,
    kinds: Vec<Group>,
    languages: Vec<Group>,
    /// The first that was solved and the first that was not.
    shown: Vec<Answer>,
}

/// Problems that have something in common.
#[derive(Serialize)]
struct Group {
    name: &'static str,
    problems: usize,
    solved: usize,
}

/// One problem in full.
#[derive(Serialize)]
struct Answer {
    prompt: String,
    continuation: String,
    answer: String,
    solved: bool,
}

/// The line of `continuation` that ends in the answer, once it is complete; what follows is another problem.
pub fn worked(continuation: &str) -> Option<&str> {
    let blank = continuation.len() - continuation.trim_start().len();
    let end = blank + continuation[blank..].find('\n')? + 1;
    Some(&continuation[..end])
}

impl Arithmetic {
    /// Scores continuations, None where there was no room for any.
    pub fn score<'a>(answered: impl Iterator<Item = (&'a Problem, Option<String>)>) -> Self {
        let mut all = Self::default();
        for (problem, continuation) in answered {
            all.too_long += usize::from(continuation.is_none());
            let text = continuation.unwrap_or_default();
            let solved = problem.solved_by(&text);
            all.problems += 1;
            all.solved += usize::from(solved);
            count(&mut all.kinds, problem.kind, solved);
            let language = if problem.language == "zh" { "Chinese" } else { "English" };
            count(&mut all.languages, language, solved);
            if !text.is_empty() && !all.shown.iter().any(|a| a.solved == solved) {
                let continuation = worked(&text).unwrap_or(&text).to_string();
                let (prompt, answer) = (problem.prompt.clone(), problem.answer.clone());
                all.shown.push(Answer { prompt, continuation, answer, solved });
            }
        }
        all.shown.sort_by_key(|a| !a.solved);
        all
    }

    /// What comes above the table, to be said before the problems are solved.
    pub fn heading(problems: usize) -> String {
        format!("\nWorked arithmetic: {problems} problems that no corpus holds, answered greedily\n\n")
    }

    /// The table, and the problems in full.
    pub fn text(&self) -> String {
        let mut s = String::new();
        for g in &self.kinds {
            let score = format!("{}/{}", g.solved, g.problems);
            let share = g.solved as f64 / g.problems as f64;
            s += &format!("  {:<16} {score:>6}  {}\n", g.name, bar(share, WIDTH));
        }
        let languages: Vec<String> =
            self.languages.iter().map(|g| format!("{} {}/{}", g.name, g.solved, g.problems)).collect();
        s += &format!(
            "  {:<16} {:>6}  ({})\n",
            "all",
            format!("{}/{}", self.solved, self.problems),
            languages.join(", ")
        );
        if self.too_long > 0 {
            s += &format!("  {} of them are longer than the model reads.\n", self.too_long);
        }
        for a in &self.shown {
            s += &match a.solved {
                true => "\n  Solved:\n\n".to_string(),
                false => format!("\n  Not solved (the answer is {}):\n\n", a.answer),
            };
            s += &indented(&a.prompt);
            s += &indented(&beginning(&a.continuation));
        }
        s
    }
}

/// The first lines, without what only repeats itself into the distance.
fn beginning(text: &str) -> String {
    let mut lines: Vec<String> = text.trim_end().lines().take(LINES).map(String::from).collect();
    if text.trim_end().lines().count() > LINES {
        lines.push("...".into());
    }
    lines.join("\n")
}

fn count(groups: &mut Vec<Group>, name: &'static str, solved: bool) {
    let at = groups.iter().position(|g| g.name == name).unwrap_or_else(|| {
        groups.push(Group { name, problems: 0, solved: 0 });
        groups.len() - 1
    });
    groups[at].problems += 1;
    groups[at].solved += usize::from(solved);
}

#[cfg(test)]
mod tests {
    use super::*;
    use hadal_data::corpus::builtin::problems;

    #[test]
    fn working_ends_with_the_answer() {
        assert_eq!(worked("1+2=3\nAdd 4"), Some("1+2=3\n"));
        assert_eq!(worked("\n1+2=3\n"), Some("\n1+2=3\n"));
        assert_eq!(worked("1+2=3"), None, "more digits may come");
    }

    #[test]
    fn scores_add_up() {
        let problems = problems(3, 18);
        let answer = |i: usize, p: &Problem| match i {
            0..9 => Some(format!("= {}\nand more", p.answer)),
            9..17 => Some("= nothing\n".to_string()),
            _ => None,
        };
        let all = Arithmetic::score(problems.iter().enumerate().map(|(i, p)| (p, answer(i, p))));
        assert_eq!((all.problems, all.solved, all.too_long), (18, 9, 1));
        let of = |g: &[Group], f: fn(&Group) -> usize| g.iter().map(f).sum::<usize>();
        assert_eq!((of(&all.kinds, |g| g.problems), of(&all.kinds, |g| g.solved)), (18, 9));
        assert_eq!((of(&all.languages, |g| g.problems), of(&all.languages, |g| g.solved)), (18, 9));
        assert_eq!(all.shown.iter().map(|a| a.solved).collect::<Vec<_>>(), [true, false]);
        assert_eq!(all.shown[0].continuation, format!("= {}\n", problems[0].answer));
        let text = all.text();
        assert!(text.contains("9/18") && text.contains(&format!("the answer is {}", problems[9].answer)), "{text}");
    }
}
