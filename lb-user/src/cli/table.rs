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
    let rows: Vec<[String; N]> = rows.into_iter().collect();
    let mut widths = columns.map(|(title, _)| title.len());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let mut line = String::new();
        for ((cell, (_, right)), width) in cells.iter().zip(columns).zip(widths) {
            let padded = if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line.push_str(&padded);
            line.push_str("  ");
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    };
    let mut text = line(columns.map(|(title, _)| title));
    for row in &rows {
        text.push_str(&line(row.each_ref().map(String::as_str)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a".to_owned(), "10".to_owned(), String::new()], ["longer".to_owned(), "9".to_owned(), "x".to_owned()]];
        assert_eq!(table([text("NAME"), number("N"), text("REST")], rows), "NAME     N  REST\na       10\nlonger   9  x\n");
    }
}
