//! Aligned tables: greppable, one line for each row, no lines drawn.

/// One column: its title, and whether its cells are numbers (which stand to the right).
pub(super) type Column = (&'static str, bool);

/// A text column.
pub(super) const fn text(title: &'static str) -> Column {
    (title, false)
}

/// A number column.
pub(super) const fn number(title: &'static str) -> Column {
    (title, true)
}

/// Puts rows under titles. Two blanks stand between columns, none at the ends of lines.
pub(super) fn table<const N: usize>(columns: [Column; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut pages = Pages::new(columns);
    for row in rows {
        pages.push(row);
    }
    pages.page()
}

/// Rows in a page of a table that may be longer than anybody wants to hold in memory.
const PAGE: usize = 1000;

/// A table page by page: titles stand above the first, and no column gets narrower.
pub(super) struct Pages<const N: usize> {
    columns: [Column; N],
    widths: [usize; N],
    rows: Vec<[String; N]>,
    /// Whether there was a page already.
    has_titles: bool,
}

impl<const N: usize> Pages<N> {
    /// An empty table.
    pub(super) fn new(columns: [Column; N]) -> Self {
        Self { columns, widths: columns.map(|(title, _)| title.len()), rows: Vec::new(), has_titles: false }
    }

    /// Takes a row, or none at the end, and gives back what is to be printed now.
    pub(super) fn take(&mut self, row: Option<[String; N]>) -> String {
        let is_end = row.is_none();
        if let Some(row) = row {
            self.push(row);
        }
        if is_end || self.rows.len() == PAGE { self.page() } else { String::new() }
    }

    fn push(&mut self, row: [String; N]) {
        for (width, cell) in self.widths.iter_mut().zip(&row) {
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push(row);
    }

    fn page(&mut self) -> String {
        let mut text = String::new();
        if !std::mem::replace(&mut self.has_titles, true) {
            text += &self.line(self.columns.map(|(title, _)| title));
        }
        for row in std::mem::take(&mut self.rows) {
            text += &self.line(row.each_ref().map(String::as_str));
        }
        text
    }

    fn line(&self, cells: [&str; N]) -> String {
        let mut line = String::new();
        for ((cell, (_, right)), &width) in cells.iter().zip(self.columns).zip(&self.widths) {
            let padded = if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line.push_str(&padded);
            line.push_str("  ");
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a".to_owned(), "10".to_owned(), String::new()], ["longer".to_owned(), "9".to_owned(), "x".to_owned()]];
        assert_eq!(table([text("NAME"), number("N"), text("REST")], rows), "NAME     N  REST\na       10\nlonger   9  x\n");
    }

    #[test]
    fn a_long_table_is_printed_page_by_page() {
        let mut pages = Pages::new([text("NAME"), number("N")]);
        let row = |name: &str| Some([name.to_owned(), "1".to_owned()]);
        assert!((1..PAGE).all(|_| pages.take(row("a")).is_empty()), "a page is not printed before it is full");
        let first = pages.take(row("longer"));
        assert!(first.starts_with("NAME    N\na       1\n") && first.lines().count() == PAGE + 1, "{first}");
        assert_eq!(pages.take(row("b")) + &pages.take(None), "b       1\n");
    }
}
