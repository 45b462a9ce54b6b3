//! `strftime_now` of chat templates: the date and time in UTC.
//!
//! transformers takes local time. UTC makes the same prompt on every machine, and needs no database of time zones; the two
//! differ in the hour, and for some hours of a day in the date.
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

pub(super) fn strftime_now(format: &str) -> Result<String, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(format, now)
}

/// C's `strftime` in its English locale, for `seconds` since 1970.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = date(days);
    let weekday = DAYS[(days + 4) as usize % 7]; // 1970 began on a Thursday
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        text += &match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                return Err(format!("strftime_now does not know %{}", other.map(String::from).unwrap_or_default()));
            }
        };
    }
    Ok(text)
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar: 400 years have 146097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let (mut year, mut days) = (1970 + days / 146_097 * 400, days % 146_097);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    /// The expected texts are `date -u -d @SECONDS +FORMAT`'s.
    #[test]
    fn writes_dates_as_c_does() {
        let cases = [
            (0, "%A %d %B %Y %H:%M:%S", "Thursday 01 January 1970 00:00:00"),
            (951_782_400, "%F %a", "2000-02-29 Tue"),
            (1_709_251_199, "%d %b %Y, %I:%M %p %T", "29 Feb 2024, 11:59 PM 23:59:59"),
            (4_107_542_400, "%F %e %y %%", "2100-03-01  1 00 %"),
        ];
        for (seconds, format, expected) in cases {
            assert_eq!(strftime(format, seconds).as_deref(), Ok(expected), "{seconds}");
        }
        assert_eq!(strftime("%Q", 0), Err("strftime_now does not know %Q".to_owned()));
    }
}
